#include "verify/payload.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "plan/numerics.hpp"
#include "verify/random.hpp"

namespace deep_ep::verify {
namespace {

// 8 significant bits over exponents -12..12 are more than the 24 bits that a float32 sum keeps, so
// that two orders of summation differ for some elements.
std::uint16_t bfloat16_bits(std::uint32_t random) {
  const std::uint32_t exponent = 127 - 12 + ((random >> 8 & 0xff) * 25 >> 8);
  return static_cast<std::uint16_t>((random >> 7 & 1) << 15 | exponent << 7 | (random & 0x7f));
}

// 11 significant bits over exponents -11..9: sums of 60 of them stay finite.
std::uint16_t float16_bits(std::uint32_t random) {
  const std::uint32_t exponent = 15 - 11 + ((random >> 11 & 0x1f) * 21 >> 5);
  return static_cast<std::uint16_t>((random >> 10 & 1) << 15 | exponent << 10 | (random & 0x3ff));
}

std::uint32_t float32_bits(std::uint32_t random) {
  const std::uint32_t exponent = 127 - 4 + ((random >> 24) * 9 >> 8);
  return (random >> 23 & 1) << 31 | exponent << 23 | (random & 0x7fffff);
}

// Eight bytes of elements from one random number.
std::uint64_t make_word(std::uint64_t random, DType dtype) {
  switch (dtype) {
    case DType::kBfloat16:
    case DType::kFloat16: {
      std::uint64_t word = 0;
      for (int i = 0; i < 64; i += 16) {
        const auto part = static_cast<std::uint32_t>(random >> i & 0xffff);
        word |= std::uint64_t{dtype == DType::kBfloat16 ? bfloat16_bits(part) : float16_bits(part)}
                << i;
      }
      return word;
    }
    case DType::kFloat32:
      return std::uint64_t{float32_bits(static_cast<std::uint32_t>(random >> 32))} << 32 |
             float32_bits(static_cast<std::uint32_t>(random));
    default: {
      // Zero bytes become ones: memory that was never written cannot pass for data.
      std::uint64_t word = random;
      for (int i = 0; i < 64; i += 8)
        if ((word >> i & 0xff) == 0) word |= std::uint64_t{1} << i;
      return word;
    }
  }
}

}  // namespace

void fill_row(std::uint64_t key, DType dtype, std::int64_t first, std::int64_t count,
              std::byte* out) {
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t bytes = count * size;
  auto index = static_cast<std::uint64_t>(first * size / 8);
  for (std::int64_t done = 0; done < bytes; done += 8, ++index) {
    const std::uint64_t word = make_word(mix(key + index * 0x9e3779b97f4a7c15u), dtype);
    std::memcpy(out + done, &word,
                static_cast<std::size_t>(std::min<std::int64_t>(8, bytes - done)));
  }
}

void fill_weights(std::uint64_t key, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i)
    out[i] = std::bit_cast<float>(
        float32_bits(static_cast<std::uint32_t>(mix(key + static_cast<std::uint64_t>(i)))) &
        0x7fffffff);
}

double element_value(DType dtype, const std::byte* element) {
  switch (dtype) {
    case DType::kBfloat16:
      return plan::to_float(std::bit_cast<plan::Bfloat16>(
          *reinterpret_cast<const std::array<std::byte, 2>*>(element)));
    case DType::kFloat16:
      return plan::to_float(std::bit_cast<plan::Float16>(
          *reinterpret_cast<const std::array<std::byte, 2>*>(element)));
    case DType::kFloat32:
      return std::bit_cast<float>(*reinterpret_cast<const std::array<std::byte, 4>*>(element));
    case DType::kInt32:
      return std::bit_cast<std::int32_t>(
          *reinterpret_cast<const std::array<std::byte, 4>*>(element));
    case DType::kInt64:
      return static_cast<double>(
          std::bit_cast<std::int64_t>(*reinterpret_cast<const std::array<std::byte, 8>*>(element)));
    default:
      return static_cast<double>(std::to_integer<int>(*element));
  }
}

}  // namespace deep_ep::verify
