#pragma once

#include "backend/cuda/internode/blocks.cuh"
#include "backend/cuda/internode/stage.cuh"

// A row of a dispatch on its way into the slots of this node's ranks, by the warp that has it.
namespace deep_ep::cuda::internode {

/// Positions of a record's rows at the ranks that a lane looks after or -1.
struct Positions {
  std::int32_t at[kRanksALane];

  __device__ Positions(const std::int32_t* positions, int ranks) {
#pragma unroll
    for (int set = 0; set < kRanksALane; ++set) {
      const int rank = set * 32 + lane_id();
      at[set] = rank < ranks ? positions[rank] : -1;
    }
  }
  /// Bit i: rank i has a row.
  __device__ std::uint64_t ranks() const {
    std::uint64_t bits = 0;
#pragma unroll
    for (int set = 0; set < kRanksALane; ++set)
      bits |= std::uint64_t{__ballot_sync(0xffffffff, at[set] >= 0)} << set * 32;
    return bits;
  }
};

/// One item, from a ring or of this rank's own tokens.
struct Arrival {
  int source;  // counted over all nodes
  plan::SourceMeta meta;
  std::int32_t record;
  Positions positions;
  Ids topk_idx;               // [K]
  const float* topk_weights;  // [K]
  const std::uint32_t* scales;
  std::int64_t scale_stride;
  const std::byte* x;  // the part that this is
  int piece;           // of the row
};

/// Slots of the rows at the ranks that a lane looks after, or -1; what does not fit is reported.
struct Slots {
  std::int32_t at[kRanksALane];
  std::uint32_t set[kRanksALane];  // ranks that have one, the same in all lanes

  /// Unless `good`, none has.
  __device__ Slots(const DispatchArgs& args, const Blocks& targets, const Arrival& row, bool good) {
#pragma unroll
    for (int i = 0; i < kRanksALane; ++i) {
      const int rank = i * 32 + lane_id();
      at[i] = -1;
      if (good && row.positions.at[i] >= 0) {
        const auto rows = targets.rows(args.rails, rank, row.source);
        const std::int64_t slot = rows.begin + row.positions.at[i];
        if (slot < rows.end) at[i] = static_cast<std::int32_t>(slot);
        if (slot >= rows.end) report(args, row, rank, row.positions.at[i], rows.end - rows.begin);
      }
      set[i] = __ballot_sync(0xffffffff, at[i] >= 0);
    }
  }
  __device__ static void report(const DispatchArgs& args, const Arrival& row, int rank,
                                std::int64_t came, std::int64_t count) {
    raise(args.comm, Finding::kBadArrival, kPeerFailedCode, row.source, row.record, rank, came,
          count);
  }
  /// Calls body(rank, slot) in all lanes, for each rank that has one.
  template <class Body>
  __device__ void for_each(Body&& body) const {
    for_each_rank(set, at, body);
  }
};

/// The forwarder's part of the handle. False, and reported, if the record is none of its source's.
__device__ inline bool note_record(const DispatchArgs& args, const Blocks& targets,
                                   const Arrival& row) {
  const Comm& comm = args.comm;
  const auto records = plan::part_of(targets.records, row.meta.node);
  const std::int64_t at = records.begin + row.record;
  if (row.record < 0 || at >= records.end || at >= args.routing.nvl_head_rows) {
    if (lane_id() == 0) Slots::report(args, row, -1, row.record, records.end - records.begin);
    return false;
  }
  std::int32_t* heads = args.routing.send_nvl_head + at * comm.num_ranks;
  bool same = true;
#pragma unroll
  for (int i = 0; i < kRanksALane; ++i) {
    const int rank = i * 32 + lane_id();
    if (rank >= comm.num_ranks) continue;
    if (args.fill_handle) heads[rank] = row.positions.at[i];
    same = same && heads[rank] == row.positions.at[i];
  }
  if (args.fill_handle && lane_id() == 0) args.work.arrived_tokens[at] = row.meta.token;
  if (__all_sync(0xffffffff, same)) return true;
  if (lane_id() == 0) raise(comm, Finding::kOtherHeads, kDisagreementCode, row.source, at);
  return false;
}

/// Entries for experts of other ranks become -1 with weight 0.
__device__ inline void place_topk(const DispatchArgs& args, const Blocks& targets,
                                  const Arrival& row, const Slots& slots) {
  const int topk = args.comm.record.num_topk;
  // This rank may have no tokens, and no arrays, yet pass on others'.
  const bool weighted = args.format.topk_weights_bytes != 0;
  const std::int64_t local_experts =
      topk == 0 ? 0 : args.comm.record.num_experts / args.rails.shape.topology.num_ranks;
  for (int base = 0; base < topk; base += 32) {
    const int k = base + lane_id();
    const std::int64_t id = k < topk ? row.topk_idx[k] : -1;
    const float weight = k < topk && weighted ? row.topk_weights[k] : 0.0f;
    slots.for_each([&](int rank, std::int64_t slot) {
      if (k >= topk) return;
      const std::int64_t local = id - args.comm.global_rank(rank) * local_experts;
      const bool here = id >= 0 && local >= 0 && local < local_experts;
      const plan::RecvArrays& to = targets.of[rank];
      const std::int64_t at = slot * topk + k;
      if (row.topk_idx.wide) {
        reinterpret_cast<std::int64_t*>(to.topk_idx)[at] = here ? local : -1;
      } else {
        reinterpret_cast<std::int32_t*>(to.topk_idx)[at] =
            here ? static_cast<std::int32_t>(local) : -1;
      }
      if (weighted) reinterpret_cast<float*>(to.topk_weights)[at] = here ? weight : 0.0f;
    });
  }
}

/// All but x. Not inlined, as put_out().
__device__ __noinline__ inline void place_small(const DispatchArgs& args, const Blocks& targets,
                                                const Arrival& row, const Slots& slots) {
#pragma unroll
  for (int i = 0; i < kRanksALane; ++i) {
    if (slots.at[i] < 0) continue;
    const plan::RecvArrays& to = targets.of[i * 32 + lane_id()];
    to.src_idx[slots.at[i]] = row.meta.token;
    reinterpret_cast<plan::SourceMeta*>(to.src_meta)[slots.at[i]] = row.meta;
  }
  place_topk(args, targets, row, slots);
  const auto scales = static_cast<int>(args.format.scale_bytes / 4);
  for (int base = 0; base < scales; base += 32) {
    const int s = base + lane_id();
    const std::uint32_t word = s < scales ? row.scales[s * row.scale_stride] : 0;
    slots.for_each([&](int rank, std::int64_t slot) {
      if (s < scales)
        reinterpret_cast<std::uint32_t*>(targets.of[rank].scales)[slot * scales + s] = word;
    });
  }
}

/// By a warp: an item to the slots of the ranks that it names; let_go() is called when it has been
/// read. What is looked up first takes its time while the stores of the item before are read. Only
/// this rank writes these slots, behind the acquire in wait_place() (I5, I19).
template <class LetGo>
__device__ void place(const DispatchArgs& args, const Blocks& targets, const Arrival& row,
                      Stage& stage, LetGo&& let_go) {
  const bool good = row.piece != 0 || note_record(args, targets, row);
  const Slots slots(args, targets, row, good);
  stage.load(row.x, args.item.x_size(row.piece));
  if (row.piece == 0) place_small(args, targets, row, slots);
  stage.load_rest();
  stage.pass(
      [&](int share) {
#pragma unroll
        for (int i = 0; i < kRanksALane; ++i) {
          if (slots.at[i] < 0) continue;
          std::byte* x = targets.of[i * 32 + lane_id()].x;
          stage.store(x + slots.at[i] * args.format.x_bytes + args.item.x_begin(row.piece), share);
        }
      },
      let_go);
}

}  // namespace deep_ep::cuda::internode
