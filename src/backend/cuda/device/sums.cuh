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

/// By a lane: kSteps times 16 bytes of kRows rows, added in order; all loads before the first use.
template <class T, int kSteps, int kRows>
__device__ void add_rows(Sum16<T> (&sums)[kSteps], const std::byte* const* rows, std::int64_t at) {
  uint4 bytes[kRows][kSteps];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const std::byte* from = rows[row] + at;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      bytes[row][i] = *reinterpret_cast<const uint4*>(from + i * 512);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) sums[i].add(bytes[row][i]);
  }
}

/// The same of any number of rows, two at a time.
template <class T, int kSteps>
__device__ void add_all(Sum16<T> (&sums)[kSteps], const std::byte* const* rows, int count,
                        std::int64_t at) {
  int i = 0;
#pragma unroll 1
  for (; i + 2 <= count; i += 2) add_rows<T, kSteps, 2>(sums, rows + i, at);
  for (; i < count; ++i) add_rows<T, kSteps, 1>(sums, rows + i, at);
}

template <int kSteps>
struct Steps {
  static constexpr int kCount = kSteps;
};

/// By a lane: body(at, Steps<n>) for n times 16 bytes, 512 apart, from `at` on, which the lane has
/// of a row of `bytes` bytes; n is the first of kMost while so many are left, then the next, then
/// 1.
template <int... kMost, class Index, class Body>
__device__ void for_each_column(Index bytes, Body&& body) {
  Index at = threadIdx.x % 32 * 16;
  const auto go_on = [&](auto steps) {
#pragma unroll 1
    for (; at + (steps.kCount - 1) * 512 < bytes; at += steps.kCount * 512) body(at, steps);
  };
  (go_on(Steps<kMost>{}), ...);
  go_on(Steps<1>{});
}

// 16-byte loads of a lane that are under way at once, of each of two rows: a row of 7168 BF16
// values in four turns; and of what is left, or of a share of a row.
constexpr int kPairUnroll = 7;
constexpr int kPairRest = 4;

/// By a warp: the sum of one row or two, which are under way together; null: there is none. Needs
/// no registers for sums, so more for loads. Not inlined, so that these are this loop's; static,
/// so that the compiler knows how many its kernel leaves it.
template <class T>
static __device__ __noinline__ void sum_pair(const std::byte* first, const std::byte* second,
                                             int bytes, std::byte* out) {
  for_each_column<kPairUnroll, kPairRest>(bytes, [&](int at, auto steps) {
    uint4 parts[2][steps.kCount] = {};
#pragma unroll
    for (int i = 0; i < steps.kCount; ++i) {
      if (first != nullptr) parts[0][i] = *reinterpret_cast<const uint4*>(first + at + i * 512);
      if (second != nullptr) parts[1][i] = *reinterpret_cast<const uint4*>(second + at + i * 512);
    }
#pragma unroll
    for (int i = 0; i < steps.kCount; ++i) {
      Sum16<T> sum;
      sum.add(parts[0][i]);
      sum.add(parts[1][i]);
      *reinterpret_cast<uint4*>(out + at + i * 512) = sum.round();
    }
  });
}

}  // namespace deep_ep::cuda
