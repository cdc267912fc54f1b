#pragma once

#include "backend/cuda/device/sums.cuh"
#include "backend/cuda/internode/blocks.cuh"

// What happens to the rows of a combine inside a node: they are read where their ranks have them.
namespace deep_ep::cuda::internode {

// 16-byte loads of a lane that are under way at once.
constexpr int kUnroll = 4;

/// The rows of a record at the ranks that a lane looks after.
struct Rows {
  std::int64_t at[kRanksALane];
  std::uint32_t set[kRanksALane];  // ranks that have one, the same in all lanes
  bool good;

  /// `number`: the record's row of send_nvl_head; `source`: whose token it is.
  __device__ Rows(const CombineArgs& args, std::int64_t number, int source) : good(true) {
    const Comm& comm = args.comm;
    const int all = args.rails.shape.topology.num_ranks;
    const std::int32_t* heads = args.send_nvl_head + number * comm.num_ranks;
#pragma unroll
    for (int i = 0; i < kRanksALane; ++i) {
      const int rank = i * 32 + lane_id();
      const std::int32_t head = rank < comm.num_ranks ? heads[rank] : -1;
      at[i] = -1;
      if (head != -1) {
        const auto rows = plan::part_of(args.rails.state.prefix + std::int64_t{rank} * all, source);
        const bool fits = head >= 0 && head < rows.end - rows.begin;
        if (fits) at[i] = rows.begin + head;
        if (!fits)
          raise_invalid(comm, Finding::kBadNvlHead, number, rank, head, rows.end - rows.begin);
        good = good && fits;
      }
      set[i] = __ballot_sync(0xffffffff, at[i] >= 0);
    }
    good = __all_sync(0xffffffff, good) != 0;
  }
  /// Calls body(rank, row) in all lanes, in ascending rank.
  template <class Body>
  __device__ void for_each(Body&& body) const {
    for_each_rank(set, at, body);
  }
};

/// By a lane: kSteps times 16 bytes of a record's sum over this node's ranks, rounded. All lanes of
/// the warp call it; `inside` says whether this one's bytes are of the row.
template <class T, int kSteps>
__device__ void sum_columns(const CombineArgs& args, const Blocks& sources, const Rows& rows,
                            std::int64_t at, bool inside, uint4 (&out)[kSteps]) {
  Sum16<T> sums[kSteps];
  rows.for_each([&](int rank, std::int64_t row) {
    const std::byte* from = sources.of[rank].x + row * args.format.x_bytes + at;
    uint4 bytes[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      bytes[i] = {};
      if (inside) bytes[i] = *reinterpret_cast<const uint4*>(from + i * 512);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) sums[i].add(bytes[i]);
  });
#pragma unroll
  for (int i = 0; i < kSteps; ++i) out[i] = sums[i].round();
}

/// The same of weight k.
__device__ inline float sum_weight(const CombineArgs& args, const Blocks& sources, const Rows& rows,
                                   int k, bool inside) {
  float sum = 0.0f;
  rows.for_each([&](int rank, std::int64_t row) {
    const auto* weights = reinterpret_cast<const float*>(sources.of[rank].topk_weights);
    if (inside) sum = plan::add(sum, weights[row * args.comm.record.num_topk + k]);
  });
  return plan::from_float<float>(sum);
}

/// By a warp: an item, a part of the record's sum.
template <class T>
__device__ void compose_sum(const CombineArgs& args, const Blocks& sources, const Rows& rows,
                            int piece, std::byte* to) {
  const int weights = static_cast<int>(args.format.topk_weights_bytes / 4);
  for (int base = 0; base < weights; base += 32) {
    const int k = base + lane_id();
    const float sum = sum_weight(args, sources, rows, k, k < weights);
    if (k < weights) reinterpret_cast<float*>(to)[k] = sum;
  }
  to += args.item.head_bytes;
  const std::int64_t begin = args.item.x_begin(piece);
  const std::int64_t bytes = args.item.x_size(piece);
  std::int64_t base = 0;
  for (; base + kUnroll * 512 <= bytes; base += kUnroll * 512) {
    uint4 out[kUnroll];
    const std::int64_t at = base + lane_id() * 16;
    sum_columns<T, kUnroll>(args, sources, rows, begin + at, true, out);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) *reinterpret_cast<uint4*>(to + at + i * 512) = out[i];
  }
  for (; base < bytes; base += 512) {
    uint4 out[1];
    const std::int64_t at = base + lane_id() * 16;
    const bool inside = at < bytes;
    sum_columns<T, 1>(args, sources, rows, begin + at, inside, out);
    if (inside) *reinterpret_cast<uint4*>(to + at) = out[0];
  }
}

}  // namespace deep_ep::cuda::internode
