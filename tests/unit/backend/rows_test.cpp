#include "backend/host/rows.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "plan/numerics.hpp"

namespace deep_ep::host {
namespace {

// Any bits: finite values, denormals, infinities and NaN of both signs, and ties, which sums of
// random 16-bit values are full of.
template <class T>
std::vector<T> random_bits(std::mt19937_64& random, std::size_t count, int wild_percent) {
  std::vector<T> values(count);
  for (T& value : values) {
    if (static_cast<int>(random() % 100) < wild_percent) {
      const std::uint64_t bits = random();
      std::memcpy(&value, &bits, sizeof value);
    } else {
      value = plan::from_float<T>(static_cast<float>(random() % 4096) / 64 - 32);
    }
  }
  return values;
}

template <class T>
void expect_sums(DType dtype, std::size_t count, int num_sources, int num_biases, Stores stores,
                 int wild_percent, bool weighted) {
  std::mt19937_64 random(count * 64 + static_cast<std::size_t>(num_sources * 8 + num_biases));
  std::vector<std::vector<T>> inputs;
  for (int i = 0; i < num_sources + num_biases; ++i)
    inputs.push_back(random_bits<T>(random, count, wild_percent));
  std::vector<const std::byte*> sources;
  for (int i = 0; i < num_sources; ++i)
    sources.push_back(reinterpret_cast<const std::byte*>(inputs[i].data()));
  alignas(64) static T out[4096];
  std::memset(out, 0x5a, sizeof out);
  SumPiece piece;
  piece.dtype = dtype;
  piece.count = static_cast<std::int64_t>(count);
  piece.sources = sources.data();
  piece.num_sources = num_sources;
  const auto weights =
      random_bits<float>(random, static_cast<std::size_t>(num_sources) + 1, wild_percent);
  if (weighted) piece.weights = weights.data();
  for (int b = 0; b < num_biases; ++b)
    piece.bias[b] = reinterpret_cast<const std::byte*>(inputs[num_sources + b].data());
  piece.out = reinterpret_cast<std::byte*>(out);
  sum_piece(piece, stores);
  finish_stores();
  for (std::size_t i = 0; i < count; ++i) {
    float sum = 0;
    for (int s = 0; s < num_sources + num_biases; ++s) {
      const float value = plan::to_float(inputs[static_cast<std::size_t>(s)][i]);
      sum = weighted && s < num_sources
                ? plan::accumulate(sum, weights[static_cast<std::size_t>(s)], value)
                : plan::add(sum, value);
    }
    const T expected = plan::from_float<T>(sum);
    ASSERT_EQ(std::memcmp(&out[i], &expected, sizeof expected), 0)
        << "element " << i << " of " << count << ", sources " << num_sources << ", biases "
        << num_biases;
  }
  T untouched;
  std::memset(&untouched, 0x5a, sizeof untouched);
  EXPECT_EQ(std::memcmp(&out[count], &untouched, sizeof untouched), 0) << "written past the end";
}

template <class T>
void expect_sums_of_all_shapes(DType dtype) {
  for (const std::size_t count : {4u, 8u, 24u, 60u, 64u, 1000u, 2048u, 4092u})
    for (const int num_sources : {0, 1, 2, 5})
      for (const int num_biases : {0, 1, 2})
        for (const Stores stores : {Stores::kCached, Stores::kStreaming})
          for (const int wild_percent : {0, 1, 100})
            for (const bool weighted : {false, true})
              expect_sums<T>(dtype, count, num_sources, num_biases, stores, wild_percent, weighted);
}

TEST(SumPiece, Bfloat16HasTheBitsOfThePlan) {
  expect_sums_of_all_shapes<plan::Bfloat16>(DType::kBfloat16);
}
TEST(SumPiece, Float16HasTheBitsOfThePlan) {
  expect_sums_of_all_shapes<plan::Float16>(DType::kFloat16);
}
TEST(SumPiece, Float32HasTheBitsOfThePlan) { expect_sums_of_all_shapes<float>(DType::kFloat32); }

TEST(SumPiece, WeightedBfloat16HasTheBitsOfThePlan) {
  std::mt19937_64 random(9);
  for (const std::size_t count : {8u, 24u, 1000u, 2048u, 4104u})
    for (const int num_sources : {0, 1, 2, 7})
      for (const int wild_percent : {0, 1, 100}) {
        std::vector<std::vector<plan::Bfloat16>> inputs;
        std::vector<const std::byte*> sources;
        for (int i = 0; i < num_sources; ++i)
          inputs.push_back(random_bits<plan::Bfloat16>(random, count, wild_percent));
        for (const auto& input : inputs)
          sources.push_back(reinterpret_cast<const std::byte*>(input.data()));
        // Thirds: products need more bits than fp32 has, so that fma and two roundings differ.
        std::vector<float> weights;
        for (int i = 0; i < num_sources; ++i)
          weights.push_back(static_cast<float>(static_cast<int>(random() % 999) - 500) / 3);
        std::vector<plan::Bfloat16> out(count);
        SumPiece piece;
        piece.count = static_cast<std::int64_t>(count);
        piece.sources = sources.data();
        piece.num_sources = num_sources;
        piece.weights = weights.data();
        piece.out = reinterpret_cast<std::byte*>(out.data());
        sum_piece(piece, Stores::kCached);
        for (std::size_t i = 0; i < count; ++i) {
          float sum = 0;
          for (int s = 0; s < num_sources; ++s)
            sum = plan::accumulate(sum, weights[s], plan::to_float(inputs[s][i]));
          ASSERT_EQ(out[i].bits, plan::from_float<plan::Bfloat16>(sum).bits)
              << "element " << i << " of " << count << ", sources " << num_sources;
        }
      }
}

TEST(CopyRow, StreamingStoresCopyExactlyTheRow) {
  std::mt19937_64 random(7);
  const auto from = random_bits<float>(random, 1024, 100);
  for (const std::size_t words : {4u, 8u, 12u, 100u, 1020u})
    for (const std::size_t shift : {0u, 4u, 8u}) {  // 16-byte steps off a vector's alignment
      std::vector<float> to(1040, 1.0f);
      auto* at = to.data() + (16 - reinterpret_cast<std::uintptr_t>(to.data()) % 16) % 16 / 4;
      copy_row(reinterpret_cast<std::byte*>(at + shift),
               reinterpret_cast<const std::byte*>(from.data()),
               static_cast<std::int64_t>(words * 4), Stores::kStreaming);
      finish_stores();
      EXPECT_EQ(std::memcmp(at + shift, from.data(), words * 4), 0);
      EXPECT_EQ(at[shift + words], 1.0f);
    }
}

TEST(CopyRow, ToSeveralPlacesIsTheSameToEach) {
  std::mt19937_64 random(8);
  const auto from = random_bits<float>(random, 1024, 100);
  alignas(64) static float memory[4][1100];
  for (const Stores stores : {Stores::kCached, Stores::kStreaming})
    for (const std::size_t words : {4u, 64u, 100u, 128u, 1020u, 1024u})
      for (const int count : {0, 1, 2, 4})
        for (const std::size_t shift : {0u, 4u}) {  // of the last place alone
          std::memset(memory, 0x5a, sizeof memory);
          std::byte* to[4];
          for (int i = 0; i < count; ++i)
            to[i] = reinterpret_cast<std::byte*>(memory[i] + (i + 1 == count ? shift : 0));
          copy_row(to, count, reinterpret_cast<const std::byte*>(from.data()),
                   static_cast<std::int64_t>(words * 4), stores);
          finish_stores();
          for (int i = 0; i < 4; ++i) {
            const std::size_t bytes = i < count ? words * 4 : 0;
            const std::byte* begin =
                i < count ? to[i] : reinterpret_cast<const std::byte*>(memory[i]);
            EXPECT_EQ(std::memcmp(begin, from.data(), bytes), 0);
            EXPECT_EQ(begin[bytes], std::byte{0x5a}) << "place " << i << " of " << count;
          }
        }
}

}  // namespace
}  // namespace deep_ep::host
