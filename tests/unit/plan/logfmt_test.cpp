#include <gtest/gtest.h>

#include <algorithm>
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
using Group = std::vector<float>;

float bf16(double value) { return to_float(from_float<Bfloat16>(static_cast<float>(value))); }

struct Coded {
  LogFmtRange range{};
  std::vector<std::uint32_t> codes{};
  Group values{};
};

Coded code(const Group& group) {
  float amax = 0.0f;
  float amin = kInfinity;
  for (const float value : group) {
    amax = logfmt_amax(amax, value);
    amin = logfmt_amin(amin, value);
  }
  Coded coded;
  coded.range = logfmt_range(amax, amin);
  const LogFmtScale scale = logfmt_scale(coded.range);
  for (const float value : group) {
    coded.codes.push_back(quantize_logfmt(value, scale));
    coded.values.push_back(dequantize_logfmt(coded.codes.back(), scale));
  }
  return coded;
}

/// docs/numerics.md, "LogFMT": (3) and what goes with it.
void expect_within_bounds(const Group& group) {
  const Coded coded = code(group);
  const double amax = to_float(coded.range.amax);
  const double amin = to_float(coded.range.amin);
  const double octaves = amax > 0 ? std::log2(amax / amin) : 0;
  ASSERT_LE(octaves, 16);
  const double relative = std::exp2(octaves / 1020 + 3e-6) - 1;
  for (std::size_t i = 0; i < group.size(); ++i) {
    const double x = group[i];
    const double got = coded.values[i];
    ASSERT_LT(coded.codes[i], 1024u);
    if (!std::isfinite(x)) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(coded.values[i]), 0x7fffffffu) << x;
      continue;
    }
    if (std::abs(x) >= std::max(amin, 0x1p-126)) {
      ASSERT_LE(std::abs(got - x), relative * std::abs(x)) << x << " in " << octaves << " octaves";
    }
    ASSERT_LE(std::abs(got - x), std::max({relative * std::abs(x), amax * 0x1.0001p-17, 0x1p-126}))
        << x;
    ASSERT_TRUE(got == 0 || std::signbit(got) == std::signbit(x)) << x;
  }
}

TEST(LogFmt, TheLogarithmAndItsReverseAreAsExactAsTheySay) {
  for (std::uint32_t i = 0; i < 1u << 23; i += 7) {
    const float f = std::ldexp(static_cast<float>(i), -23);
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(1.0f + f);
    ASSERT_NEAR(detail::log2_of_mantissa(bits), std::log2(1.0 + double{f}), 5e-7) << f;
    ASSERT_NEAR(detail::exp2_of_fraction(f) / std::exp2(double{f}), 1.0, 2e-7) << f;
  }
  EXPECT_EQ(detail::log2_of_mantissa(0x40800000), 0.0f);
  EXPECT_EQ(detail::exp2_of_fraction(0.0f), 1.0f);
}

TEST(LogFmt, ZerosStayZeroAndOneSizeIsExact) {
  const Coded zeros = code({0.0f, -0.0f, 0.0f});
  EXPECT_EQ(zeros.range.amax.bits, 0);
  EXPECT_EQ(zeros.range.amin.bits, 0);
  EXPECT_EQ(zeros.codes, (std::vector<std::uint32_t>{0, 0, 0}));
  EXPECT_EQ(zeros.values, (Group{0.0f, 0.0f, 0.0f}));
  // amax = amin, beside zeros.
  for (const float value : {1.0f, 0x1p-126f, 0x1p127f}) {
    EXPECT_EQ(code({value, -value, 0.0f, value}).values, (Group{value, -value, 0.0f, value}));
  }
}

TEST(LogFmt, TheRangesEndsHaveTheOutermostCodes) {
  const Coded coded = code({3.5f, -0.125f, 0.7578125f});
  EXPECT_EQ(coded.range.amax.bits, from_float<Bfloat16>(3.5f).bits);
  EXPECT_EQ(coded.range.amin.bits, from_float<Bfloat16>(0.125f).bits);
  EXPECT_EQ(coded.codes[0], 511u);
  EXPECT_EQ(coded.codes[1], kLogFmtSign | 1u);
  EXPECT_EQ(coded.codes[2], 1u + 276u) << "510 log2(0.7578125 / 0.125) / log2(3.5 / 0.125)";
}

TEST(LogFmt, ARangeHas16OctavesAtMost) {
  const Coded coded = code({1.0f, 0x1p-16f, 0x1.8p-17f, 0x1p-17f, 0x1.fcp-18f, 0x1p-100f});
  EXPECT_EQ(to_float(coded.range.amin), 0x1p-16f);
  EXPECT_EQ(coded.values, (Group{1.0f, 0x1p-16f, 0x1p-16f, 0x1p-16f, 0.0f, 0.0f}))
      << "below half of the range's beginning zero is nearer";
  expect_within_bounds({0x1.fep127f, 0x1p-126f, 0x1p111f, -0x1p110f});
}

TEST(LogFmt, SubnormalNumbersAreZero) {
  const Coded coded = code({0x1p-126f, 0x1.fcp-127f, -0x1p-133f, 0x1p-120f});
  EXPECT_EQ(coded.codes[1], 0u);
  EXPECT_EQ(coded.codes[2], 0u);
  EXPECT_EQ(coded.values[0], 0x1p-126f);
  EXPECT_EQ(code({0x1p-130f, 0x1p-133f}).range.amax.bits, 0);
}

TEST(LogFmt, WhatIsNotFiniteIsNanAndLeavesItsNeighboursAlone) {
  const Group finite{1.0f, -2.0f, 0.75f, 0.0f};
  const Coded alone = code(finite);
  for (const float value : {kNan, -kNan, kInfinity, -kInfinity}) {
    Group group = finite;
    group.push_back(value);
    const Coded coded = code(group);
    EXPECT_TRUE(std::isnan(coded.values.back()));
    EXPECT_EQ(coded.codes.back(), kLogFmtSign);
    for (std::size_t i = 0; i < finite.size(); ++i) EXPECT_EQ(coded.values[i], alone.values[i]);
  }
}

TEST(LogFmt, RandomGroupsStayWithinTheirBounds) {
  WITH_SEED(11);
  std::mt19937_64 random(11);
  std::normal_distribution<double> normal;
  for (int i = 0; i < 2000; ++i) {
    Group group;
    const double size = std::exp2(static_cast<double>(random() % 200) - 100);
    for (int k = 0; k < kLogFmtGroup; ++k) group.push_back(bf16(normal(random) * size));
    expect_within_bounds(group);
  }
}

TEST(LogFmt, GroupsOfAnyBitsStayWithinTheirBounds) {
  WITH_SEED(12);
  std::mt19937_64 random(12);
  for (int i = 0; i < 5000; ++i) {
    Group group;
    // Few or all exponents, at any place, the ends included.
    const auto octaves = static_cast<std::uint32_t>(1 + random() % (i % 3 == 0 ? 256 : 20));
    const auto first = static_cast<std::uint32_t>(random() % (257 - octaves));
    for (int k = 0; k < kLogFmtGroup; ++k) {
      const auto exponent = static_cast<std::uint32_t>(first + random() % octaves);
      const auto bits = static_cast<std::uint32_t>(random() & 0x807f) | exponent << 7;
      group.push_back(to_float(Bfloat16{static_cast<std::uint16_t>(bits)}));
    }
    expect_within_bounds(group);
  }
}

TEST(LogFmt, LargerMagnitudesNeverHaveSmallerCodes) {
  for (const std::uint32_t span : {1u, 2u, 100u, 1000u, 2048u, 3000u}) {
    Group group;
    for (std::uint32_t bits = 0x3f80; bits <= 0x3f80 + span; ++bits)
      group.push_back(to_float(Bfloat16{static_cast<std::uint16_t>(bits)}));
    const Coded coded = code(group);
    EXPECT_TRUE(std::is_sorted(coded.codes.begin(), coded.codes.end())) << span;
    EXPECT_TRUE(std::is_sorted(coded.values.begin(), coded.values.end())) << span;
    EXPECT_EQ(coded.codes.back(), 511u);
  }
}

}  // namespace
}  // namespace deep_ep::plan::test
