#pragma once

#include <cmath>
#include <cstdint>

#include "base/portable.hpp"

// The arithmetic of the library, written out once: every backend and the reference give the same
// bits. docs/numerics.md explains the choices and derives the error bounds.
namespace deep_ep::plan {

struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
/// 4 exponent bits (bias 7), 3 mantissa bits, no infinity, NaN 0x7f and 0xff, largest value 448.
struct Float8E4m3 {
  std::uint8_t bits;
};

/// The bits of `value` as To. The builtin, since nvcc accepts it in device code without flags.
template <class To, class From>
DEEP_EP_HD inline To bit_cast(From value) {
  return __builtin_bit_cast(To, value);
}

// One IEEE operation each, rounded to nearest even, subnormals kept. Named, so that no compiler
// merges an addition with a neighbouring multiplication: nvcc does that to plain operators.
DEEP_EP_HD inline float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
DEEP_EP_HD inline float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
DEEP_EP_HD inline float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
/// acc + weight * x with one rounding.
DEEP_EP_HD inline float accumulate(float acc, float weight, float x) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(weight, x, acc);
#else
  return std::fma(weight, x, acc);
#endif
}

namespace detail {

constexpr std::uint32_t kFloatInfinity = 0x7f800000;

DEEP_EP_HD inline std::uint32_t magnitude(float value) {
  return bit_cast<std::uint32_t>(value) & 0x7fffffff;
}
DEEP_EP_HD inline bool is_nan(float value) { return magnitude(value) > kFloatInfinity; }

/// A float format with fewer exponent and mantissa bits than fp32.
template <int kMantissaBits, int kBias>
struct SmallFloat {
  static constexpr int kShift = 23 - kMantissaBits;
  static constexpr std::uint32_t kRebias = std::uint32_t{127 - kBias} << 23;
  static constexpr std::uint32_t kSmallestNormal = kRebias + (1u << 23);
  /// A power of two whose fp32 neighbour is one smallest subnormal of this format away: adding it
  /// rounds a smaller number to a multiple of that subnormal, left in the low bits of the sum.
  static constexpr std::uint32_t kSubnormalOne = std::uint32_t{127 + 24 - kBias - kMantissaBits}
                                                 << 23;

  /// Code of a non-negative finite fp32 number, which may round up to 2^(emax + 1) at most.
  DEEP_EP_HD static std::uint32_t encode(std::uint32_t magnitude) {
    if (magnitude < kSmallestNormal) {
      const float sum = add(bit_cast<float>(magnitude), bit_cast<float>(kSubnormalOne));
      return bit_cast<std::uint32_t>(sum) - kSubnormalOne;
    }
    const std::uint32_t odd = (magnitude >> kShift) & 1;
    return (magnitude - kRebias + (1u << (kShift - 1)) - 1 + odd) >> kShift;
  }

  /// Exact. `code` is a finite number without its sign.
  DEEP_EP_HD static float decode(std::uint32_t code) {
    if (code >> kMantissaBits == 0) {
      return add(bit_cast<float>(kSubnormalOne | code), -bit_cast<float>(kSubnormalOne));
    }
    return bit_cast<float>((code << kShift) + kRebias);
  }
};
using Half = SmallFloat<10, 15>;
using E4m3 = SmallFloat<3, 7>;

DEEP_EP_HD inline float with_sign(float magnitude, std::uint32_t sign) {
  return bit_cast<float>(bit_cast<std::uint32_t>(magnitude) | sign);
}

}  // namespace detail

/// Exact; a NaN stays some NaN.
DEEP_EP_HD inline float to_float(float value) { return value; }
DEEP_EP_HD inline float to_float(Bfloat16 value) {
  return bit_cast<float>(std::uint32_t{value.bits} << 16);
}
DEEP_EP_HD inline float to_float(Float16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t code = value.bits & 0x7fffu;
  if (code >= 0x7c00u)
    return bit_cast<float>(sign | detail::kFloatInfinity | (code & 0x3ffu) << 13);
  return detail::with_sign(detail::Half::decode(code), sign);
}
DEEP_EP_HD inline float to_float(Float8E4m3 value) {
  const std::uint32_t sign = (value.bits & 0x80u) << 24;
  const std::uint32_t code = value.bits & 0x7fu;
  if (code == 0x7fu) return bit_cast<float>(0x7fffffffu);
  return detail::with_sign(detail::E4m3::decode(code), sign);
}

/// Round to nearest, ties to even; overflow to infinity (Float8E4m3: to +-448, infinities too);
/// every NaN becomes the canonical one (0x7fffffff, 0x7fff, 0x7fff, 0x7f), as CUDA's conversions
/// do.
template <class T>
DEEP_EP_HD T from_float(float value);

template <>
DEEP_EP_HD inline float from_float<float>(float value) {
  return detail::is_nan(value) ? bit_cast<float>(0x7fffffffu) : value;
}
template <>
DEEP_EP_HD inline Bfloat16 from_float<Bfloat16>(float value) {
  if (detail::is_nan(value)) return {0x7fff};
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
template <>
DEEP_EP_HD inline Float16 from_float<Float16>(float value) {
  if (detail::is_nan(value)) return {0x7fff};
  const std::uint32_t sign = (bit_cast<std::uint32_t>(value) >> 16) & 0x8000u;
  const std::uint32_t magnitude = detail::magnitude(value);
  // 65536 and more; what lies between 65520 and 65536 rounds up to infinity's code.
  const std::uint32_t code = magnitude >= 0x47800000u ? 0x7c00u : detail::Half::encode(magnitude);
  return {static_cast<std::uint16_t>(sign | code)};
}
template <>
DEEP_EP_HD inline Float8E4m3 from_float<Float8E4m3>(float value) {
  if (detail::is_nan(value)) return {0x7f};
  const std::uint32_t sign = (bit_cast<std::uint32_t>(value) >> 24) & 0x80u;
  const std::uint32_t magnitude = detail::magnitude(value);
  const std::uint32_t code = magnitude >= 0x43e00000u ? 0x7eu : detail::E4m3::encode(magnitude);
  return {static_cast<std::uint8_t>(sign | code)};
}

// FP8 with scales. A group of kFp8Group values shares one scale: amax = the largest magnitude, from
// 0 on through fp8_amax; then quantize_fp8 each value. value ~ to_float(code) * scale.

constexpr int kFp8Group = 128;
constexpr float kFp8Max = 448.0f;
/// Keeps scale and inverse normal numbers, groups of zeros included.
constexpr float kFp8MinAmax = 1e-4f;

/// Independent of the order in which values come. A NaN is passed over: only its own code tells.
DEEP_EP_HD inline float fp8_amax(float amax, float value) {
  const float magnitude = bit_cast<float>(detail::magnitude(value));
  return magnitude > amax ? magnitude : amax;
}

struct Fp8Scale {
  float scale;    // what the receiver multiplies with
  float inverse;  // what the sender multiplies with
};

/// Of a group with infinities the scale is infinite, so that all its values come out as NaN.
DEEP_EP_HD inline Fp8Scale fp8_scale(float amax) {
  if (amax < kFp8MinAmax) amax = kFp8MinAmax;
  return {divide(amax, kFp8Max), divide(kFp8Max, amax)};
}

/// The scale rounded up to a power of two; the inverse is exact.
DEEP_EP_HD inline Fp8Scale fp8_power_of_two_scale(float amax) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(fp8_scale(amax).scale);
  const float scale = bit_cast<float>((bits + 0x007fffffu) & 0xff800000u);
  return {scale, divide(1.0f, scale)};
}

DEEP_EP_HD inline Float8E4m3 quantize_fp8(float value, float inverse) {
  return from_float<Float8E4m3>(multiply(value, inverse));
}
DEEP_EP_HD inline float dequantize_fp8(Float8E4m3 code, float scale) {
  return multiply(to_float(code), scale);
}

/// UE8M0: the exponent byte of a power of two. An infinite scale gives 255, the format's NaN.
DEEP_EP_HD inline std::uint8_t to_ue8m0(float power_of_two) {
  return static_cast<std::uint8_t>(bit_cast<std::uint32_t>(power_of_two) >> 23);
}
/// 0 stands for 2^-127, as the format says; fp8_power_of_two_scale never gives it.
DEEP_EP_HD inline float from_ue8m0(std::uint8_t byte) {
  if (byte == 0) return bit_cast<float>(0x00400000u);
  if (byte == 255) return bit_cast<float>(0x7fffffffu);
  return bit_cast<float>(std::uint32_t{byte} << 23);
}

// LogFMT: ten bits a value. A group of kLogFmtGroup values of bfloat16 shares a range, and a code
// says where between the logarithms of its ends a magnitude lies. amax from 0 on through
// logfmt_amax and amin from infinity on through logfmt_amin, their range, its scale, then a code
// each. No library's logarithm is asked, since those of host and GPU differ.

constexpr int kLogFmtGroup = 128;
constexpr std::uint32_t kLogFmtSteps = 510;   // from code 1, where the range begins, to its end
constexpr std::uint32_t kLogFmtSign = 0x200;  // with code 0: not a finite number
constexpr std::uint32_t kLogFmtOctaves = 16;  // of a range at most

namespace detail {

constexpr std::uint32_t kSmallestNormal = 0x00800000;

// Of f^(i + 1) in polynomials for log2(1 + f) and 2^f - 1. Functions, since device code sees no
// array of the host.
DEEP_EP_HD constexpr float log2_factor(int i) {
  constexpr float kFactors[] = {1.4426677117f, -0.7205835151f, 0.4735420552f, -0.3258708779f,
                                0.1942506173f, -0.0795271937f, 0.0155215082f};
  return kFactors[i];
}
DEEP_EP_HD constexpr float exp2_factor(int i) {
  constexpr float kFactors[] = {0.6931513119f, 0.2401644496f, 0.0557999147f, 0.0090170285f,
                                0.0018671308f};
  return kFactors[i];
}

/// log2(1 + f), exact at 0, off by 5e-7 at most. `bits` are those of a number whose mantissa is
/// 1 + f.
DEEP_EP_HD inline float log2_of_mantissa(std::uint32_t bits) {
  const float f = add(bit_cast<float>((bits & 0x007fffffu) | 0x3f800000u), -1.0f);
  float sum = accumulate(log2_factor(5), f, log2_factor(6));
  sum = accumulate(log2_factor(4), f, sum);
  sum = accumulate(log2_factor(3), f, sum);
  sum = accumulate(log2_factor(2), f, sum);
  sum = accumulate(log2_factor(1), f, sum);
  sum = accumulate(log2_factor(0), f, sum);
  return multiply(f, sum);
}

/// 2^f for f from 0 to 1, exact at 0, else off by 2e-7 of itself at most.
DEEP_EP_HD inline float exp2_of_fraction(float f) {
  float sum = accumulate(exp2_factor(3), f, exp2_factor(4));
  sum = accumulate(exp2_factor(2), f, sum);
  sum = accumulate(exp2_factor(1), f, sum);
  sum = accumulate(exp2_factor(0), f, sum);
  return accumulate(1.0f, f, sum);
}

/// Subnormal numbers count as zero, what is not finite has a code of its own.
DEEP_EP_HD inline bool has_logarithm(std::uint32_t magnitude) {
  return magnitude >= kSmallestNormal && magnitude < kFloatInfinity;
}

}  // namespace detail

// Independent of the order in which values come.
DEEP_EP_HD inline float logfmt_amax(float amax, float value) {
  const std::uint32_t magnitude = detail::magnitude(value);
  const bool larger = detail::has_logarithm(magnitude) && bit_cast<float>(magnitude) > amax;
  return larger ? bit_cast<float>(magnitude) : amax;
}
DEEP_EP_HD inline float logfmt_amin(float amin, float value) {
  const std::uint32_t magnitude = detail::magnitude(value);
  const bool smaller = detail::has_logarithm(magnitude) && bit_cast<float>(magnitude) < amin;
  return smaller ? bit_cast<float>(magnitude) : amin;
}

/// What travels with the codes of a group; zeros if none of its values has a logarithm.
struct LogFmtRange {
  Bfloat16 amax;
  Bfloat16 amin;  // or kLogFmtOctaves below amax, if that is more
};

DEEP_EP_HD inline LogFmtRange logfmt_range(float amax, float amin) {
  const auto most = static_cast<std::int32_t>(bit_cast<std::uint32_t>(amax));
  auto least = static_cast<std::int32_t>(bit_cast<std::uint32_t>(amin));
  const std::int32_t lowest = most - static_cast<std::int32_t>(kLogFmtOctaves << 23);
  if (least < lowest) least = lowest;
  if (most == 0) least = 0;
  return {{static_cast<std::uint16_t>(most >> 16)}, {static_cast<std::uint16_t>(least >> 16)}};
}

/// The same at sender and receiver.
struct LogFmtScale {
  std::uint32_t begin;  // bits of the range's beginning
  float log2_begin;     // of its mantissa
  float step;           // from code to code, in octaves
  float inverse;        // what the sender multiplies with
};

namespace detail {

/// log2 of a number that has one, from the range's beginning on.
DEEP_EP_HD inline float logfmt_log2(std::uint32_t bits, std::uint32_t begin, float log2_begin) {
  const auto octaves = static_cast<float>(static_cast<std::int32_t>(bits >> 23) -
                                          static_cast<std::int32_t>(begin >> 23));
  return add(octaves, add(log2_of_mantissa(bits), -log2_begin));
}

}  // namespace detail

DEEP_EP_HD inline LogFmtScale logfmt_scale(LogFmtRange range) {
  const std::uint32_t begin = std::uint32_t{range.amin.bits} << 16;
  const float log2_begin = detail::log2_of_mantissa(begin);
  const float span = detail::logfmt_log2(std::uint32_t{range.amax.bits} << 16, begin, log2_begin);
  constexpr auto kSteps = static_cast<float>(kLogFmtSteps);
  return {begin, log2_begin, multiply(span, 1.0f / kSteps),
          span > 0.0f ? divide(kSteps, span) : 0.0f};
}

DEEP_EP_HD inline std::uint32_t quantize_logfmt(float value, const LogFmtScale& scale) {
  const std::uint32_t magnitude = detail::magnitude(value);
  if (magnitude >= detail::kFloatInfinity) return kLogFmtSign;
  // Zero is nearer than the range's beginning.
  constexpr std::uint32_t kOctave = detail::kSmallestNormal;
  if (magnitude < kOctave || magnitude + kOctave < scale.begin) return 0;
  float steps =
      multiply(detail::logfmt_log2(magnitude, scale.begin, scale.log2_begin), scale.inverse);
  constexpr auto kSteps = static_cast<float>(kLogFmtSteps);
  if (steps < 0.0f) steps = 0.0f;
  if (steps > kSteps) steps = kSteps;
  // The last bit of the sum is 1: it is rounded to nearest even there.
  const std::uint32_t whole = bit_cast<std::uint32_t>(add(steps, 8388608.0f)) & 0x1ffu;
  return (whole + 1) | (bit_cast<std::uint32_t>(value) >> 31) * kLogFmtSign;
}

DEEP_EP_HD inline float dequantize_logfmt(std::uint32_t code, const LogFmtScale& scale) {
  const std::uint32_t number = code & (kLogFmtSign - 1);
  if (number == 0) return code == 0 ? 0.0f : bit_cast<float>(0x7fffffffu);
  const float log2 = accumulate(scale.log2_begin, static_cast<float>(number - 1), scale.step);
  const auto octaves = static_cast<std::uint32_t>(log2);
  const float mantissa = detail::exp2_of_fraction(add(log2, -static_cast<float>(octaves)));
  const std::uint32_t exponent = (scale.begin & 0x7f800000u) + (octaves << 23) - 0x3f800000u;
  return detail::with_sign(bit_cast<float>(bit_cast<std::uint32_t>(mantissa) + exponent),
                           (code & kLogFmtSign) << 22);
}

}  // namespace deep_ep::plan
