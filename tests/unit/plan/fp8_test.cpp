#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "plan/numerics.hpp"
#include "unit/plan/routing.hpp"

namespace deep_ep::plan::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
std::uint8_t encode(float value) { return from_float<Float8E4m3>(value).bits; }

/// The definition of the format, in fp64.
double value_of(int code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

/// The nearest of all codes, of two the even one; by trying them.
std::uint8_t nearest(float value) {
  if (std::isnan(value)) return 0x7f;
  const double magnitude = std::min(std::abs(double{value}), 448.0);
  int best = 0;
  for (int code = 1; code < 0x7f; ++code) {
    const double distance = std::abs(value_of(code) - magnitude);
    const double best_distance = std::abs(value_of(best) - magnitude);
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) best = code;
  }
  return static_cast<std::uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

TEST(Float8E4m3, AllCodesHaveTheirValueAndComeBack) {
  for (int code = 0; code < 256; ++code) {
    const float value = to_float(Float8E4m3{static_cast<std::uint8_t>(code)});
    if ((code & 0x7f) == 0x7f) {
      EXPECT_EQ(bits_of(value), 0x7fffffffu);
      EXPECT_EQ(encode(value), 0x7f);
    } else {
      EXPECT_EQ(value, value_of(code)) << code;
      EXPECT_EQ(std::signbit(value), (code & 0x80) != 0) << code;
      EXPECT_EQ(encode(value), code);
    }
  }
}

TEST(Float8E4m3, RoundsToNearestEvenBetweenAllNeighbours) {
  for (int code = 0; code < 0x7e; ++code) {
    const auto middle = static_cast<float>((value_of(code) + value_of(code + 1)) / 2);
    for (const float x :
         {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, kInfinity)}) {
      EXPECT_EQ(encode(x), nearest(x)) << x;
      EXPECT_EQ(encode(-x), nearest(-x)) << -x;
    }
    EXPECT_EQ(encode(middle) % 2, 0) << middle;
  }
}

TEST(Float8E4m3, RoundsRandomFloatsToNearestEven) {
  WITH_SEED(6);
  std::mt19937_64 random(6);
  for (int i = 0; i < 50'000; ++i) {
    const auto bits = static_cast<std::uint32_t>(random() >> 32);
    // Every second one within the format's range, where roundings differ.
    const std::uint32_t exponent = 112 + bits % 26;
    const float value =
        std::bit_cast<float>(i % 2 == 0 ? bits : (bits & 0x807fffffu) | exponent << 23);
    ASSERT_EQ(encode(value), nearest(value)) << value;
  }
}

TEST(Float8E4m3, Saturates) {
  for (const float value : {448.0f, 463.0f, 464.0f, 480.0f, 1e30f, kInfinity}) {
    EXPECT_EQ(encode(value), 0x7e) << value;
    EXPECT_EQ(encode(-value), 0xfe) << value;
  }
  EXPECT_EQ(encode(kNan), 0x7f);
  EXPECT_EQ(encode(-kNan), 0x7f);
}

TEST(Fp8Scale, KnownValues) {
  EXPECT_EQ(fp8_scale(448.0f).scale, 1.0f);
  EXPECT_EQ(fp8_scale(448.0f).inverse, 1.0f);
  EXPECT_EQ(fp8_scale(1.0f).scale, 1.0f / 448.0f);
  EXPECT_EQ(fp8_scale(1.0f).inverse, 448.0f);
  EXPECT_EQ(fp8_scale(0.0f).scale, 1e-4f / 448.0f) << "amax is floored";
  EXPECT_EQ(fp8_scale(0.99e-4f).inverse, 448.0f / 1e-4f) << "amax is floored";
  EXPECT_EQ(fp8_power_of_two_scale(448.0f).scale, 1.0f);
  EXPECT_EQ(fp8_power_of_two_scale(449.0f).scale, 2.0f);
  EXPECT_EQ(fp8_power_of_two_scale(449.0f).inverse, 0.5f);
  EXPECT_EQ(fp8_power_of_two_scale(std::nextafter(896.0f, 0.0f)).scale, 2.0f);
  EXPECT_EQ(to_ue8m0(1.0f), 127);
  EXPECT_EQ(to_ue8m0(fp8_power_of_two_scale(449.0f).scale), 128);
}

TEST(Fp8Scale, PowersOfTwoCoverTheGroupAndStayNormal) {
  WITH_SEED(7);
  std::mt19937_64 random(7);
  std::vector<float> amaxes = {0.0f, 1e-4f, std::numeric_limits<float>::max()};
  for (int i = 0; i < 100'000; ++i)
    amaxes.push_back(std::abs(std::bit_cast<float>(static_cast<std::uint32_t>(random() >> 32))));
  for (const float amax : amaxes) {
    if (std::isnan(amax) || std::isinf(amax)) continue;
    const auto [scale, inverse] = fp8_power_of_two_scale(amax);
    ASSERT_EQ(bits_of(scale) & 0x7fffffu, 0u) << amax;
    ASSERT_TRUE(std::isnormal(scale) && std::isnormal(inverse)) << amax;
    ASSERT_EQ(scale * inverse, 1.0f);
    ASSERT_GE(scale, fp8_scale(amax).scale);
    ASSERT_LT(scale, 2 * fp8_scale(amax).scale);
    ASSERT_EQ(from_ue8m0(to_ue8m0(scale)), scale);
  }
}

TEST(Fp8Scale, Ue8m0HasAllPowersAndItsNan) {
  EXPECT_EQ(from_ue8m0(0), std::ldexp(1.0f, -127));
  for (int byte = 1; byte < 255; ++byte) {
    const float value = from_ue8m0(static_cast<std::uint8_t>(byte));
    EXPECT_EQ(value, std::ldexp(1.0f, byte - 127));
    EXPECT_EQ(to_ue8m0(value), byte);
  }
  EXPECT_TRUE(std::isnan(from_ue8m0(255)));
  EXPECT_EQ(to_ue8m0(fp8_power_of_two_scale(kInfinity).scale), 255);
}

using Group = std::array<float, kFp8Group>;

float amax_of(const Group& group) {
  float amax = 0;
  for (const float value : group) amax = fp8_amax(amax, value);
  return amax;
}

TEST(Fp8Group, EveryValueComesBackWithinHalfAStep) {
  for (int seed = 0; seed < 500; ++seed) {
    WITH_SEED(seed);
    std::mt19937_64 random(seed);
    Group group{};
    const int exponent = static_cast<int>(pick(random, -20, 100));
    std::normal_distribution<double> normal;
    for (float& value : group) value = static_cast<float>(std::ldexp(normal(random), exponent));
    const float amax = amax_of(group);
    for (const Fp8Scale& scale : {fp8_scale(amax), fp8_power_of_two_scale(amax)}) {
      for (const float value : group) {
        const Float8E4m3 code = quantize_fp8(value, scale.inverse);
        const double error = std::abs(double{dequantize_fp8(code, scale.scale)} - value);
        // Half a step: 2^-4 of the value, at least half a subnormal; fp32's roundings beside it.
        const double half_step = std::max(std::abs(value) * 0x1p-4, scale.scale * 0x1p-10);
        ASSERT_LE(error, half_step * (1 + 0x1p-18)) << value << " amax " << amax;
      }
    }
  }
}

TEST(Fp8Group, ItsLargestValueTakesTheLargestCode) {
  for (int seed = 0; seed < 2000; ++seed) {
    WITH_SEED(seed);
    std::mt19937_64 random(seed);
    const auto exponent = static_cast<std::uint32_t>(pick(random, 114, 254));
    const float amax =
        std::bit_cast<float>(exponent << 23 | static_cast<std::uint32_t>(random() >> 41));
    EXPECT_EQ(quantize_fp8(amax, fp8_scale(amax).inverse).bits, 0x7e) << amax;
    EXPECT_EQ(quantize_fp8(-amax, fp8_scale(amax).inverse).bits, 0xfe) << amax;
  }
}

TEST(Fp8Group, ANanTouchesOnlyItselfInAnyOrder) {
  for (const std::size_t place : {0u, 5u, 127u}) {
    Group group{};
    group.fill(2.0f);
    group[place] = place == 5 ? -kNan : kNan;
    const Fp8Scale scale = fp8_scale(amax_of(group));
    EXPECT_EQ(scale.scale, 2.0f / 448.0f);
    for (std::size_t i = 0; i < group.size(); ++i)
      EXPECT_EQ(quantize_fp8(group[i], scale.inverse).bits, i == place ? 0x7f : 0x7e);
  }
}

TEST(Fp8Group, AnInfinityMakesTheWholeGroupNan) {
  Group group{};
  group.fill(2.0f);
  group[17] = -kInfinity;
  const float amax = amax_of(group);
  for (const Fp8Scale& scale : {fp8_scale(amax), fp8_power_of_two_scale(amax)}) {
    for (const float value : group) {
      const Float8E4m3 code = quantize_fp8(value, scale.inverse);
      EXPECT_TRUE(std::isnan(dequantize_fp8(code, scale.scale)));
    }
  }
}

TEST(Fp8Group, ZerosStaySignedZeros) {
  const Fp8Scale scale = fp8_scale(0.0f);
  EXPECT_EQ(quantize_fp8(0.0f, scale.inverse).bits, 0x00);
  EXPECT_EQ(quantize_fp8(-0.0f, scale.inverse).bits, 0x80);
}

}  // namespace
}  // namespace deep_ep::plan::test
