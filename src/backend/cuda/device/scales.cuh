#pragma once

#include "plan/numerics.hpp"

// plan::fp8_scale and plan::fp8_power_of_two_scale bit for bit (tests/cuda compares them for all
// floats), without a branch: the scales of several groups are found side by side then, where the
// compiler's division, which asks at each for numbers that it cannot do, makes it one after the
// other.
namespace deep_ep::cuda {

/// A quotient to the nearest, where the divisor's reciprocal and all that comes of it is normal:
/// Newton's step for the reciprocal, then two corrections by exact remainders.
__device__ inline float divide_normal(float dividend, float divisor) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(divisor));
  reciprocal = __fmaf_rn(__fmaf_rn(-divisor, reciprocal, 1.0f), reciprocal, reciprocal);
  float quotient = __fmul_rn(dividend, reciprocal);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    quotient = __fmaf_rn(__fmaf_rn(-divisor, quotient, dividend), reciprocal, quotient);
  return quotient;
}

/// Of a group whose largest magnitude is `amax`; a NaN counts as 0.
__device__ inline plan::Fp8Scale fp8_scale(float amax, bool exact) {
  constexpr float kInfinity = __builtin_huge_valf();
  amax = fmaxf(amax, plan::kFp8MinAmax);
  const bool infinite = amax == kInfinity;
  const float scale = infinite ? kInfinity : divide_normal(amax, plan::kFp8Max);
  if (exact) {
    // Divided by a power of two, so that the reciprocal of the largest is a normal number.
    constexpr float kShrink = 1.0f / 256;
    const float inverse = divide_normal(plan::kFp8Max, amax * kShrink) * kShrink;
    return {scale, infinite ? 0.0f : inverse};
  }
  const std::uint32_t bits = (__float_as_uint(scale) + 0x007fffffu) & 0xff800000u;
  // Of a power of two: what its exponent lacks.
  return {__uint_as_float(bits), infinite ? 0.0f : __uint_as_float(0x7f000000u - bits)};
}

}  // namespace deep_ep::cuda
