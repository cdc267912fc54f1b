#pragma once

#include "backend/cuda/internode_ll/stage.cuh"
#include "plan/numerics.hpp"
#include "plan/wire.hpp"

// A row on its way home in shared memory, as plan::WireRow says, by units of eight values: what a
// thread writes and reads. Sixteen neighbouring units are a group.
namespace deep_ep::cuda::internode_ll {

/// The values of a unit of bfloat16.
struct Values8 {
  float values[8];

  __device__ explicit Values8(const uint4& bytes) {
    const std::uint32_t pairs[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = __uint_as_float(pairs[i] << 16);
      values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  }
};

/// The same in all lanes of a group, which take part: `join` of the values of all of them.
template <class Join>
__device__ float over_group(float value, Join&& join) {
  const unsigned half = 0xffffu << (threadIdx.x & 16u);
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2)
    value = join(value, __shfl_xor_sync(half, value, distance));
  return value;
}

struct LogFmtWire {
  /// By all lanes of a group.
  static __device__ void put(const uint4& bytes, int unit, const plan::WireRow& at,
                             std::byte* row) {
    const Values8 unit_values(bytes);
    float amax = 0.0f;
    float amin = __uint_as_float(plan::detail::kFloatInfinity);
#pragma unroll
    for (const float value : unit_values.values) {
      amax = plan::logfmt_amax(amax, value);
      amin = plan::logfmt_amin(amin, value);
    }
    amax = over_group(amax, plan::logfmt_amax);
    amin = over_group(amin, plan::logfmt_amin);
    const plan::LogFmtRange range = plan::logfmt_range(amax, amin);
    const plan::LogFmtScale scale = plan::logfmt_scale(range);
    std::uint32_t low[2] = {};
    std::uint32_t high = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t code = plan::quantize_logfmt(unit_values.values[i], scale);
      low[i / 4] |= (code & 0xffu) << i % 4 * 8;
      high |= code >> 8 << i * 2;
    }
    reinterpret_cast<uint2*>(row)[unit] = {low[0], low[1]};
    reinterpret_cast<std::uint16_t*>(row + at.high)[unit] = static_cast<std::uint16_t>(high);
    if (threadIdx.x % 16 == 0)
      reinterpret_cast<std::uint32_t*>(row + at.words)[unit / 16] =
          range.amax.bits | std::uint32_t{range.amin.bits} << 16;
  }

  /// Adds a unit to eight sums.
  static __device__ void add(const std::byte* row, int unit, const plan::WireRow& at, float* sums) {
    const uint2 low = reinterpret_cast<const uint2*>(row)[unit];
    const std::uint32_t high = reinterpret_cast<const std::uint16_t*>(row + at.high)[unit];
    const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(row + at.words)[unit / 16];
    const plan::LogFmtScale scale = plan::logfmt_scale(
        {{static_cast<std::uint16_t>(word)}, {static_cast<std::uint16_t>(word >> 16)}});
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t byte = (i < 4 ? low.x : low.y) >> i % 4 * 8 & 0xffu;
      const std::uint32_t code = byte | (high >> i * 2 & 3u) << 8;
      sums[i] = plan::add(sums[i], plan::dequantize_logfmt(code, scale));
    }
  }
};

struct Fp8Wire {
  static __device__ void put(const uint4& bytes, int unit, const plan::WireRow& at,
                             std::byte* row) {
    float scale = 0.0f;
    reinterpret_cast<uint2*>(row)[unit] =
        quantize(bytes, Scaling::kFloat, 0xffffu << (threadIdx.x & 16u), scale);
    if (threadIdx.x % 16 == 0) reinterpret_cast<float*>(row + at.words)[unit / 16] = scale;
  }

  static __device__ void add(const std::byte* row, int unit, const plan::WireRow& at, float* sums) {
    const uint2 codes = reinterpret_cast<const uint2*>(row)[unit];
    const float scale = reinterpret_cast<const float*>(row + at.words)[unit / 16];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t code = (i < 4 ? codes.x : codes.y) >> i % 4 * 8 & 0xffu;
      const plan::Float8E4m3 value{static_cast<std::uint8_t>(code)};
      sums[i] = plan::add(sums[i], plan::dequantize_fp8(value, scale));
    }
  }
};

}  // namespace deep_ep::cuda::internode_ll
