#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "plan/numerics.hpp"

// Sums of rows in fp32 with the bits of plan/numerics.hpp: 16 bytes a step.
namespace deep_ep::cuda {

// The conversions of the hardware, which round and make NaNs canonical as plan::from_float does;
// tests/cuda compares all of them.

__device__ __forceinline__ float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ float2 widen(__half2 pair) { return __half22float2(pair); }
__device__ __forceinline__ void narrow(float2 pair, __nv_bfloat162& to) {
  to = __floats2bfloat162_rn(pair.x, pair.y);
}
__device__ __forceinline__ void narrow(float2 pair, __half2& to) {
  to = __floats2half2_rn(pair.x, pair.y);
}

/// The elements of 16 bytes, two at a time, summed. Pair is __nv_bfloat162 or __half2.
template <class Pair>
struct Sum16 {
  float2 sums[4] = {};

  __device__ void add(const uint4& bytes) {
    const Pair* pairs = reinterpret_cast<const Pair*>(&bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 value = widen(pairs[i]);
      sums[i].x = plan::add(sums[i].x, value.x);
      sums[i].y = plan::add(sums[i].y, value.y);
    }
  }
  /// fma(weight, element, sum).
  __device__ void add(const uint4& bytes, float weight) {
    const Pair* pairs = reinterpret_cast<const Pair*>(&bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 value = widen(pairs[i]);
      sums[i].x = plan::accumulate(sums[i].x, weight, value.x);
      sums[i].y = plan::accumulate(sums[i].y, weight, value.y);
    }
  }
  __device__ uint4 round() const {
    uint4 bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) narrow(sums[i], reinterpret_cast<Pair*>(&bytes)[i]);
    return bytes;
  }
};

template <>
struct Sum16<float> {
  float sums[4] = {};

  __device__ void add(const uint4& bytes) {
    const float* values = reinterpret_cast<const float*>(&bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = plan::add(sums[i], values[i]);
  }
  __device__ void add(const uint4& bytes, float weight) {
    const float* values = reinterpret_cast<const float*>(&bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = plan::accumulate(sums[i], weight, values[i]);
  }
  __device__ uint4 round() const {
    uint4 bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reinterpret_cast<float*>(&bytes)[i] = plan::from_float<float>(sums[i]);
    }
    return bytes;
  }
};

}  // namespace deep_ep::cuda
