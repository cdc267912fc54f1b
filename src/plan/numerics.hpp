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

}  // namespace deep_ep::plan
