#pragma once

#include "backend/cuda/internode_ll/ticket.cuh"
#include "plan/numerics.hpp"

// One row of the source on its way into shared memory, as it will travel: x, then its scales.
namespace deep_ep::cuda::internode_ll {

__device__ inline float2 widen_bfloat16(std::uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

/// Eight values, one lane's share of a group of 128, as FP8.
__device__ inline uint2 quantize(const uint4& values, float inverse) {
  const std::uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
  std::uint32_t codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = widen_bfloat16(pairs[i]);
    codes[i] = convert_e4m3x2(plan::multiply(pair.x, inverse), plan::multiply(pair.y, inverse));
  }
  return {codes[0] | codes[1] << 16, codes[2] | codes[3] << 16};
}

__device__ inline float largest(const uint4& values) {
  const std::uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = widen_bfloat16(pairs[i]);
    amax = plan::fp8_amax(plan::fp8_amax(amax, pair.x), pair.y);
  }
  return amax;
}

/// A row of bfloat16 as FP8 and its scales, in shared memory: half a warp a group of 128.
__device__ inline void stage_quantized(const DispatchArgs& args, std::int64_t token,
                                       std::byte* row) {
  const auto* from = reinterpret_cast<const uint4*>(args.x + token * args.x_bytes * 2);
  const auto units = static_cast<int>(args.x_bytes / 8);
  const unsigned half = 0xffffu << (threadIdx.x & 16u);
  for (int i = threadIdx.x; i < units; i += blockDim.x) {
    const uint4 values = from[i];
    float amax = largest(values);
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2)
      amax = plan::fp8_amax(amax, __shfl_xor_sync(half, amax, distance));
    const plan::Fp8Scale scale = args.scaling == Scaling::kFloat
                                     ? plan::fp8_scale(amax)
                                     : plan::fp8_power_of_two_scale(amax);
    reinterpret_cast<uint2*>(row)[i] = quantize(values, scale.inverse);
    if (threadIdx.x % 16 != 0) continue;
    const int group = i / 16;
    std::byte* scales = row + args.x_bytes;
    if (args.scaling == Scaling::kUe8m0) {
      scales[group] = static_cast<std::byte>(plan::to_ue8m0(scale.scale));
    } else {
      reinterpret_cast<float*>(scales)[group] = scale.scale;
    }
  }
  if (args.scaling != Scaling::kUe8m0) return;
  // Behind the last scale of the last word.
  const auto groups = static_cast<int>(args.x_bytes / plan::kFp8Group);
  for (int i = groups + static_cast<int>(threadIdx.x); i < args.num_scales * 4; i += blockDim.x)
    row[args.x_bytes + i] = std::byte{0};
}

__device__ inline void stage_plain(const DispatchArgs& args, std::int64_t token, std::byte* row) {
  const auto* from = reinterpret_cast<const uint4*>(args.x + token * args.x_bytes);
  const auto units = static_cast<int>(args.x_bytes / 16);
  for (int i = threadIdx.x; i < units; i += blockDim.x) reinterpret_cast<uint4*>(row)[i] = from[i];
  auto* scales = reinterpret_cast<std::uint32_t*>(row + args.x_bytes);
  const StridedWords& words = args.x_scales;
  for (int i = threadIdx.x; i < args.num_scales; i += blockDim.x)
    scales[i] = words.data[token * words.row_stride + i * words.column_stride];
}

template <bool kQuantize>
__device__ void stage_row(const DispatchArgs& args, std::int64_t token, std::byte* row) {
  if constexpr (kQuantize) {
    stage_quantized(args, token, row);
  } else {
    stage_plain(args, token, row);
  }
}

}  // namespace deep_ep::cuda::internode_ll
