#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backend/cuda/arrays.hpp"
#include "backend/cuda/comm.hpp"
#include "plan/low_latency.hpp"
#include "plan/wire.hpp"

// The kernels of low latency, one function each that launches it. Every pointer is memory of this
// rank's GPU unless it says otherwise. The same instantiation runs for a whole call, for its
// sending and for its receiving part.
namespace deep_ep::cuda::internode_ll {

/// Where a block's dynamic shared memory has what, in bytes; each kernel takes what it needs.
struct SharedOffsets {
  int topk = 0;  // K
  std::uint32_t used = 0;
  std::uint32_t route = 0;      // Route
  std::uint32_t marks = 0;      // Marks
  std::uint32_t announced = 0;  // Announced
  std::uint32_t messages = 0;   // [R] of this rank's tokens
  std::uint32_t entries = 0;    // [K] of a message that has come
  std::uint32_t places = 0;     // [K] of its rows
  std::uint32_t num_places = 0;
  std::uint32_t counts = 0;  // [E]
  std::uint32_t row = 0;     // one row
  std::uint32_t sums = 0;    // [H] of a token
  std::uint32_t ranges = 0;  // [L, R] or [R]
  // Of a token on its own rank:
  std::uint32_t own_addends = 0;  // [K]
  std::uint32_t num_own = 0;
  std::uint32_t own_row = 0;  // one row

  std::uint32_t take(std::int64_t bytes) {
    const std::uint32_t offset = used;
    used += static_cast<std::uint32_t>((bytes + 15) / 16 * 16);
    return offset;
  }
  void take_route(const plan::LowLatencyShape& shape) {
    topk = shape.num_topk;
    route = take(std::int64_t{4} * (7 * topk + 1));
    marks = take(std::int64_t{4} * (shape.num_experts + shape.num_ranks + 2));
  }
};

struct StepArgs {
  /// Whether there are ranks that messages are put to.
  static constexpr bool kPuts = false;

  Comm comm;
  const protocol::FaultRecord* fault = nullptr;  // of this rank
  bool sends = true;
  bool receives = true;
  bool rank_major = false;
  plan::LowLatencyKind kind{};
  plan::LowLatencyShape shape;
  int local_experts = 1;               // L
  std::uint64_t rank_factor = 0;       // see rank_of()
  plan::LowLatencyLayout layout;       // of this rank
  plan::LowLatencyPlaces places;       // of this rank, of even tickets
  SharedOffsets shared;                // by the launch
  Ids topk_idx;                        // [N, K]
  std::int64_t num_tokens = 0;         // N
  int slice_shift = 0;                 // blocks that share a row, as a power of two; by the launch
  std::uint64_t* ticket = nullptr;     // written by sending, read by receiving alone
  std::uint64_t first_ticket = 0;      // tickets begin behind it
  std::int32_t* masks = nullptr;       // [R] with enable_shrink, else null
  std::int64_t* wait_stats = nullptr;  // += [R] or null

  static constexpr int kMaxExperts = 1 << 16;
  /// expert / L by a multiplication: exact for up to kMaxExperts experts.
  void set_experts(int per_rank) {
    local_experts = per_rank;
    rank_factor = ((std::uint64_t{1} << 32) + per_rank - 1) / per_rank;
  }
  /// Ids of a token that are as many as a thread loads at once, and aligned for that.
  static constexpr int kWholeIds = 8;
  DEEP_EP_HD bool loads_whole_ids() const {
    return shape.num_topk == kWholeIds && reinterpret_cast<std::uintptr_t>(topk_idx.data) % 16 == 0;
  }
  DEEP_EP_HD int rank_of(int expert) const {
    return static_cast<int>(static_cast<std::uint64_t>(expert) * rank_factor >> 32);
  }
};

/// How rows of bfloat16 become FP8.
enum class Scaling : std::uint8_t { kFloat, kPowerOfTwo, kUe8m0 };

struct DispatchArgs : StepArgs {
  const std::byte* x = nullptr;  // [N, H] bfloat16 if quantised, else [N, x_bytes]
  bool quantize = false;
  Scaling scaling = Scaling::kFloat;
  StridedWords x_scales;                // [N, S] or null
  const float* topk_weights = nullptr;  // [N, K] or null
  std::int64_t x_bytes = 0;             // of a row on its way; its scales follow
  int num_scales = 0;                   // words
  bool scales_beside = false;           // in packets: see RowWords; by the launch
  std::byte* recv_x = nullptr;          // [L, R * M, x_bytes] or [R, M, x_bytes]
  std::uint32_t* recv_scales = nullptr;
  std::int64_t recv_scales_strides[3] = {};
  std::int32_t* recv_count = nullptr;
  void* recv_topk_idx = nullptr;  // [R, M, K], of topk_idx's width
  float* recv_topk_weights = nullptr;
  std::int32_t* src_info = nullptr;
  std::int64_t* layout_range = nullptr;
  std::int32_t* cumulative_stats = nullptr;  // += [L] or null
};
/// Error: cudaErrorInvalidValue if a row or the experts are too many for shared memory.
cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream);

struct CombineArgs : StepArgs {
  const std::byte* x = nullptr;         // [L, R * M, H] or [R, M, H] bfloat16
  const float* topk_weights = nullptr;  // [N, K]; null if rank-major
  const std::int32_t* src_info = nullptr;
  const std::int64_t* layout_range = nullptr;
  std::byte* combined_x = nullptr;  // [N, H]
  // Of rows that come home in another format than bfloat16.
  plan::WireFormat wire = plan::WireFormat::kBfloat16;
  std::int64_t hidden = 0;  // H
  plan::WireRow wire_row{};
};
/// Error: cudaErrorInvalidValue if a row is too much for shared memory.
cudaError_t launch_combine(const CombineArgs& args, int num_sms, cudaStream_t stream);

/// Of launch_combine: formats that are not bfloat16.
cudaError_t launch_wire_combine(const CombineArgs& args, int num_sms, cudaStream_t stream);

/// masks[rank] = value; all of them if rank is negative.
cudaError_t launch_set_mask(std::int32_t* masks, int num_ranks, int rank, std::int32_t value,
                            cudaStream_t stream);

// Each loads its kernels on the current device.
cudaError_t load_dispatch();
cudaError_t load_combine();
cudaError_t load_wire_combine();
cudaError_t load_mask();

}  // namespace deep_ep::cuda::internode_ll
