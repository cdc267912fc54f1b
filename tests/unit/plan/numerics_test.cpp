#include "plan/numerics.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "unit/plan/routing.hpp"

namespace deep_ep::plan::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }
std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }

/// Both signs of fp32 numbers at which rounding may change its mind: for every code of a 16-bit
/// format its value, the middle to the next code, and the fp32 neighbours of both. Rounding is
/// monotone, so that these decide about all others.
template <class T>
std::vector<float> breakpoints(std::uint16_t infinity) {
  std::vector<float> values;
  for (std::uint32_t code = 0; code < infinity; ++code) {
    const float value = to_float(T{static_cast<std::uint16_t>(code)});
    const float next = to_float(T{static_cast<std::uint16_t>(code + 1)});
    // Behind the largest finite number the next one would be as far as the one before.
    const float before = code == 0 ? 0.0f : to_float(T{static_cast<std::uint16_t>(code - 1)});
    const float half = std::isinf(next) ? (value - before) / 2 : (next - value) / 2;
    for (const float point : {value, value + half})
      for (const float x : {std::nextafter(point, 0.0f), point, std::nextafter(point, kInfinity)})
        values.insert(values.end(), {x, -x});
  }
  return values;
}

std::vector<float> random_floats(std::uint64_t seed, int count) {
  std::mt19937_64 random(seed);
  std::vector<float> values;
  for (int i = 0; i < count; ++i)
    values.push_back(float_of(static_cast<std::uint32_t>(random() >> 32)));
  return values;
}

/// A format's numbers by its definition, in fp64, where all their distances are exact. Infinity
/// stands where the next number would, as IEEE 754 rounds.
template <int kExponentBits, int kMantissaBits>
struct Definition {
  Definition() {
    const int bias = (1 << (kExponentBits - 1)) - 1;
    const int infinity = ((1 << kExponentBits) - 1) << kMantissaBits;
    for (int code = 0; code <= infinity; ++code) {
      const int exponent = std::max(code >> kMantissaBits, 1);
      const int mantissa = code - ((exponent - 1) << kMantissaBits);
      values.push_back(std::ldexp(mantissa, exponent - bias - kMantissaBits));
    }
  }

  /// The code of the nearest number, of two the even one.
  std::uint16_t nearest(float value) const {
    if (std::isnan(value)) return 0x7fff;
    const double magnitude = std::min(std::abs(double{value}), values.back());
    const auto above = std::lower_bound(values.begin(), values.end(), magnitude) - values.begin();
    const auto below = std::max<std::ptrdiff_t>(above - 1, 0);
    const double to_above = values[above] - magnitude;
    const double to_below = std::abs(magnitude - values[below]);
    const bool up = to_above == to_below ? above % 2 == 0 : to_above < to_below;
    return static_cast<std::uint16_t>((up ? above : below) | (std::signbit(value) ? 0x8000 : 0));
  }

  std::vector<double> values;
};
using Bfloat16Definition = Definition<8, 7>;
using Float16Definition = Definition<5, 10>;

TEST(Bfloat16, EveryCodeIsTheUpperHalfOfItsFloatAndComesBack) {
  for (std::uint32_t code = 0; code < 65536; ++code) {
    const Bfloat16 value{static_cast<std::uint16_t>(code)};
    ASSERT_EQ(bits_of(to_float(value)), code << 16);
    const bool nan = (code & 0x7fff) > 0x7f80;
    ASSERT_EQ(from_float<Bfloat16>(to_float(value)).bits, nan ? 0x7fff : code);
  }
}

TEST(Bfloat16, RoundsToNearestEvenAtEveryBreakpoint) {
  const Bfloat16Definition bfloat16;
  for (const float value : breakpoints<Bfloat16>(0x7f80))
    ASSERT_EQ(from_float<Bfloat16>(value).bits, bfloat16.nearest(value)) << value;
}

TEST(Bfloat16, RoundsRandomFloatsToNearestEven) {
  WITH_SEED(1);
  const Bfloat16Definition bfloat16;
  for (const float value : random_floats(1, 1'000'000))
    ASSERT_EQ(from_float<Bfloat16>(value).bits, bfloat16.nearest(value)) << value;
}

TEST(Bfloat16, KnownValues) {
  EXPECT_EQ(from_float<Bfloat16>(1.0f).bits, 0x3f80);
  EXPECT_EQ(from_float<Bfloat16>(-2.0f).bits, 0xc000);
  EXPECT_EQ(from_float<Bfloat16>(-0.0f).bits, 0x8000);
  EXPECT_EQ(from_float<Bfloat16>(float_of(0x3f808000)).bits, 0x3f80) << "tie to even, down";
  EXPECT_EQ(from_float<Bfloat16>(float_of(0x3f818000)).bits, 0x3f82) << "tie to even, up";
  EXPECT_EQ(from_float<Bfloat16>(std::numeric_limits<float>::max()).bits, 0x7f80);
  EXPECT_EQ(from_float<Bfloat16>(-kInfinity).bits, 0xff80);
  EXPECT_EQ(from_float<Bfloat16>(float_of(1)).bits, 0);
  EXPECT_EQ(from_float<Bfloat16>(float_of(0x00018000)).bits, 2) << "a tie between subnormals";
}

TEST(Float16, EveryCodeHasItsValueAndComesBack) {
  const Float16Definition float16;
  for (std::uint32_t code = 0; code < 65536; ++code) {
    const Float16 half{static_cast<std::uint16_t>(code)};
    const float value = to_float(half);
    const std::uint32_t magnitude = code & 0x7fff;
    ASSERT_EQ(std::isnan(value), magnitude > 0x7c00) << code;
    ASSERT_EQ(std::isinf(value), magnitude == 0x7c00) << code;
    ASSERT_EQ(std::signbit(value), code >= 0x8000) << code;
    if (magnitude < 0x7c00) {
      ASSERT_EQ(std::abs(value), float16.values[magnitude]) << code;
    }
    ASSERT_EQ(from_float<Float16>(value).bits, magnitude > 0x7c00 ? 0x7fff : code);
  }
}

TEST(Float16, RoundsToNearestEvenAtEveryBreakpoint) {
  const Float16Definition float16;
  for (const float value : breakpoints<Float16>(0x7c00))
    ASSERT_EQ(from_float<Float16>(value).bits, float16.nearest(value)) << value;
}

#if defined(__FLT16_MANT_DIG__)
TEST(Float16, AgreesWithTheCompilersType) {
  WITH_SEED(2);
  for (std::uint32_t code = 0; code < 0x7c00; ++code) {
    const Float16 half{static_cast<std::uint16_t>(code)};
    ASSERT_EQ(to_float(half), static_cast<float>(std::bit_cast<_Float16>(half.bits))) << code;
  }
  std::vector<float> values = breakpoints<Float16>(0x7c00);
  for (const float value : random_floats(2, 2'000'000))
    if (!std::isnan(value)) values.push_back(value);
  for (const float value : values)
    ASSERT_EQ(from_float<Float16>(value).bits,
              std::bit_cast<std::uint16_t>(static_cast<_Float16>(value)))
        << value;
}
#endif

TEST(Float16, KnownValues) {
  EXPECT_EQ(from_float<Float16>(1.0f).bits, 0x3c00);
  EXPECT_EQ(from_float<Float16>(-0.0f).bits, 0x8000);
  EXPECT_EQ(from_float<Float16>(65504.0f).bits, 0x7bff);
  EXPECT_EQ(from_float<Float16>(std::nextafter(65520.0f, 0.0f)).bits, 0x7bff);
  EXPECT_EQ(from_float<Float16>(65520.0f).bits, 0x7c00);
  EXPECT_EQ(from_float<Float16>(-kInfinity).bits, 0xfc00);
  EXPECT_EQ(from_float<Float16>(std::ldexp(1.0f, -24)).bits, 1);
  EXPECT_EQ(from_float<Float16>(std::ldexp(1.0f, -25)).bits, 0) << "tie to even";
  EXPECT_EQ(from_float<Float16>(std::ldexp(3.0f, -25)).bits, 2) << "tie to even";
  EXPECT_EQ(from_float<Float16>(-std::ldexp(1.5f, -25)).bits, 0x8001);
  EXPECT_EQ(from_float<Float16>(float_of(1)).bits, 0) << "fp32 subnormals vanish";
}

TEST(Numerics, EveryNanBecomesTheCanonicalOne) {
  for (const std::uint32_t sign : {0u, 0x80000000u}) {
    for (const std::uint32_t mantissa : {1u, 0x1234u, 0x400000u, 0x7fffffu}) {
      const float nan = float_of(sign | 0x7f800000u | mantissa);
      EXPECT_EQ(from_float<Bfloat16>(nan).bits, 0x7fff);
      EXPECT_EQ(from_float<Float16>(nan).bits, 0x7fff);
      EXPECT_EQ(bits_of(from_float<float>(nan)), 0x7fffffffu);
    }
  }
  EXPECT_EQ(bits_of(from_float<float>(add(kInfinity, -kInfinity))), 0x7fffffffu);
}

TEST(Numerics, Fp32PassesUnchangedSubnormalsAndSignedZerosIncluded) {
  WITH_SEED(3);
  std::vector<float> values = random_floats(3, 100'000);
  values.insert(values.end(), {0.0f, -0.0f, float_of(1), kInfinity, -kInfinity});
  for (const float value : values)
    if (!std::isnan(value)) {
      ASSERT_EQ(bits_of(from_float<float>(to_float(value))), bits_of(value));
    }
}

TEST(Numerics, AccumulateRoundsOnce) {
  // (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24; the last term survives only without rounding the product.
  const float x = 1.0f + std::ldexp(1.0f, -12);
  EXPECT_EQ(accumulate(-1.0f, x, x), std::ldexp(1.0f, -11) + std::ldexp(1.0f, -24));
  EXPECT_EQ(add(multiply(x, x), -1.0f), std::ldexp(1.0f, -11)) << "two roundings stay two";
  EXPECT_EQ(accumulate(3.0f, 2.0f, 5.0f), 13.0f);
}

TEST(Numerics, ASumThatStartsAtPlusZeroHasNoMinusZero) {
  EXPECT_EQ(bits_of(add(0.0f, -0.0f)), 0u);
  EXPECT_EQ(bits_of(add(add(0.0f, 1.0f), -1.0f)), 0u);
}

/// Largest error that docs/numerics.md allows a sum of n terms with sum of magnitudes `total`.
template <class T>
double combine_bound(int n, double total) {
  const bool bfloat = std::is_same_v<T, Bfloat16>;
  const double u = std::ldexp(1.0, -24);
  const double v = std::ldexp(1.0, bfloat ? -8 : -11);
  const double eta = std::ldexp(1.0, bfloat ? -134 : -25);
  const double gamma = (n - 1) * u / (1 - (n - 1) * u);
  return (gamma + v * (1 + gamma)) * total + eta;
}

template <class T>
void expect_sums_within_bound(std::uint64_t seed) {
  WITH_SEED(seed);
  std::mt19937_64 random(seed);
  double closest = 0;
  for (int round = 0; round < 20'000; ++round) {
    const int n = static_cast<int>(pick(random, 1, 40));
    const int exponent = static_cast<int>(pick(random, -28, 8));
    float acc = 0.0f;
    double exact = 0;
    double total = 0;
    for (int i = 0; i < n; ++i) {
      // Multiples of 2^-20 * 2^exponent, or coarser: 40 of them add up exactly in fp64.
      const double multiple = static_cast<double>(pick(random, -(1 << 20), 1 << 20));
      const double noise = std::ldexp(multiple, exponent - 20);
      const float term = to_float(from_float<T>(static_cast<float>(noise)));
      acc = add(acc, term);
      exact += term;
      total += std::abs(term);
    }
    const double error = std::abs(to_float(from_float<T>(acc)) - exact);
    ASSERT_LE(error, combine_bound<T>(n, total));
    if (total > 0) closest = std::max(closest, error / combine_bound<T>(n, total));
  }
  EXPECT_GT(closest, 0.5) << "the bound is not idle";
}

TEST(Numerics, SumsStayWithinTheDocumentedBound) {
  expect_sums_within_bound<Bfloat16>(4);
  expect_sums_within_bound<Float16>(5);
}

}  // namespace
}  // namespace deep_ep::plan::test
