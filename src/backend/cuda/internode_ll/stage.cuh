#pragma once

#include "backend/cuda/device/scales.cuh"
#include "backend/cuda/internode_ll/slices.cuh"
#include "plan/numerics.hpp"

// One row of the source on its way into shared memory, as it will travel: x, then its scales.
namespace deep_ep::cuda::internode_ll {

__device__ inline float2 widen_bfloat16(std::uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

/// The larger magnitudes of two pairs of bfloat16; a NaN is passed over for a number.
__device__ inline std::uint32_t max_magnitudes(std::uint32_t a, std::uint32_t b) {
  constexpr std::uint32_t kMagnitudes = 0x7fff7fff;
  a &= kMagnitudes;
  b &= kMagnitudes;
  const __nv_bfloat162 larger = __hmax2(reinterpret_cast<const __nv_bfloat162&>(a),
                                        reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const std::uint32_t&>(larger);
}

/// Eight values, one lane's share of a group of 128, as FP8; its half warp has the others. The
/// scale is the same in all of the half warp. `lanes`: who calls, in whole half warps.
__device__ inline uint2 quantize(const uint4& values, Scaling scaling, unsigned lanes,
                                 float& scale) {
  std::uint32_t largest =
      max_magnitudes(max_magnitudes(values.x, values.y), max_magnitudes(values.z, values.w));
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2)
    largest = max_magnitudes(largest, __shfl_xor_sync(lanes, largest, distance));
  const float2 pair = widen_bfloat16(largest);
  const plan::Fp8Scale both = fp8_scale(fmaxf(pair.x, pair.y), scaling == Scaling::kFloat);
  scale = both.scale;
  const std::uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
  std::uint32_t codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 wide = widen_bfloat16(pairs[i]);
    codes[i] =
        convert_e4m3x2(plan::multiply(wide.x, both.inverse), plan::multiply(wide.y, both.inverse));
  }
  return {codes[0] | codes[1] << 16, codes[2] | codes[3] << 16};
}

/// A thread's first units of 16 bytes of a slice of a row, on their way before anybody waits for
/// them. If the row is quantised, two of them become one.
template <bool kQuantize>
struct RowUnits {
  static constexpr int kUnits = 4;
  const uint4* from;
  int thread;  // of those that share the slice; an idle one is before the first
  int stride;
  int begin;  // this thread's first one
  int end;    // of the slice
  uint4 next[kUnits];

  /// By all warps but the first `idle` ones.
  __device__ RowUnits(const DispatchArgs& args, std::int64_t token, const Slice& slice, int idle)
      : thread(static_cast<int>(threadIdx.x) - idle * 32), stride(kThreads - idle * 32) {
    constexpr int kRatio = kQuantize ? 2 : 1;
    from = reinterpret_cast<const uint4*>(args.x + token * args.x_bytes * kRatio);
    begin = slice.first_unit() * kRatio + thread;
    end = slice.end_unit(static_cast<int>(args.x_bytes / 16)) * kRatio;
    if (thread < 0 || token >= args.num_tokens) end = begin;
    load(begin);
  }

  /// By the same warps: into shared memory.
  __device__ void stage(const DispatchArgs& args, std::int64_t token, const Slice& slice,
                        std::byte* row) {
    if (thread < 0) return;
    if (end - begin + thread <= stride) {
      // A share of a row may be one unit a thread, and its code is short then.
      stage_units<1>(args, begin, row);
    } else {
#pragma unroll 1
      for (int unit = begin;;) {
        stage_units<kUnits>(args, unit, row);
        unit += kUnits * stride;
        // Alike in a warp, whose lanes quantise together.
        if (unit - lane_id() >= end) break;
        load(unit);
      }
    }
    stage_scales(args, token, slice, row);
  }

 private:
  __device__ void load(int unit) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i)
      next[i] = unit + i * stride < end ? from[unit + i * stride] : uint4{};
  }

  template <int kCount>
  __device__ void stage_units(const DispatchArgs& args, int unit, std::byte* row) const {
    if constexpr (kQuantize) {
      // All are under way together: nothing branches before the stores.
      uint2 codes[kCount];
      float scales[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        codes[i] = quantize(next[i], args.scaling, 0xffffffff, scales[i]);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (unit + i * stride < end) reinterpret_cast<uint2*>(row)[unit + i * stride] = codes[i];
      if (lane_id() % 16 != 0) return;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (unit + i * stride < end)
          store_scale(args, (unit + i * stride) / 16, scales[i], row + args.x_bytes);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (unit + i * stride < end) reinterpret_cast<uint4*>(row)[unit + i * stride] = next[i];
    }
  }

  static __device__ void store_scale(const DispatchArgs& args, int group, float scale,
                                     std::byte* scales) {
    if (args.scaling == Scaling::kUe8m0) {
      scales[group] = static_cast<std::byte>(plan::to_ue8m0(scale));
    } else {
      reinterpret_cast<float*>(scales)[group] = scale;
    }
  }

  __device__ void stage_scales(const DispatchArgs& args, std::int64_t token, const Slice& slice,
                               std::byte* row) const {
    if constexpr (kQuantize) {
      // Behind the last scale of the last word.
      const auto scales = static_cast<int>(args.x_bytes) / plan::kFp8Group;
      const int i = scales + thread;
      if (args.scaling == Scaling::kUe8m0 && i < args.num_scales * 4)
        row[args.x_bytes + i] = std::byte{0};
    } else {
      auto* scales = reinterpret_cast<std::uint32_t*>(row + args.x_bytes);
      const StridedWords& words = args.x_scales;
#pragma unroll 1
      for (int i = first_scale(args, slice) + thread; i < end_scale(args, slice); i += stride)
        scales[i] = words.data[token * words.row_stride + i * words.column_stride];
    }
  }
};

}  // namespace deep_ep::cuda::internode_ll
