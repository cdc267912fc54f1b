#pragma once

#include "backend/cuda/internode/blocks.cuh"
#include "backend/cuda/internode/rail_pump.cuh"

// A row of a dispatch on its way into the slots of this node's ranks, by the warp that has it.
namespace deep_ep::cuda::internode {

/// Positions of a record's rows at the ranks that a lane looks after or -1.
struct Positions {
  std::int32_t at[kRanksALane];

  __device__ Positions(const std::int32_t* positions, int ranks) {  // null with 0 ranks
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

/// Where the small things of an item are.
struct ArrivalHead {
  Ids topk_idx;               // [K]
  const float* topk_weights;  // [K]
  const std::uint32_t* scales;
  std::int64_t scale_stride;
};

/// One item, from a ring or of this rank's own tokens. It is made ahead of its use, since all that
/// it loads takes its time.
struct Arrival {
  static constexpr int kScalesALane = 2;

  int source = 0;           // counted over all nodes
  plan::SourceMeta meta{};  // but for `ranks`
  std::int32_t record = 0;
  std::int64_t at = 0;  // of the record among all that come to this node
  Positions positions{nullptr, 0};
  std::int32_t told[kRanksALane];  // what the handle says of them
  ArrivalHead head{};
  std::int64_t id = -1;  // entry `lane`, and so on
  float weight = 0.0f;
  std::uint32_t scale[kScalesALane];
  const std::byte* x = nullptr;  // the part that this is
  int piece = 0;                 // of the row

  /// Loads what is known only from `head` and `at`.
  __device__ void load(const DispatchArgs& args) {
    const int topk = args.comm.record.num_topk;
    // This rank may have no tokens, and no arrays, yet pass on others'.
    if (lane_id() < topk) {
      id = head.topk_idx[lane_id()];
      if (args.format.topk_weights_bytes != 0) weight = head.topk_weights[lane_id()];
    }
    const auto scales = static_cast<int>(args.format.scale_bytes / 4);
#pragma unroll
    for (int i = 0; i < kScalesALane; ++i) {
      const int s = i * 32 + lane_id();
      scale[i] = s < scales ? head.scales[s * head.scale_stride] : 0;
    }
    if (args.fill_handle || at >= args.routing.nvl_head_rows) return;
    const std::int32_t* heads = args.routing.send_nvl_head + at * args.comm.num_ranks;
#pragma unroll
    for (int i = 0; i < kRanksALane; ++i) {
      const int rank = i * 32 + lane_id();
      told[i] = rank < args.comm.num_ranks ? heads[rank] : -1;
    }
  }
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
        if (slot >= rows.end)
          report(args, row.source, row.record, rank, row.positions.at[i], rows.end - rows.begin);
      }
      set[i] = __ballot_sync(0xffffffff, at[i] >= 0);
    }
  }
  __device__ static void report(const DispatchArgs& args, int source, std::int32_t record, int rank,
                                std::int64_t came, std::int64_t count) {
    raise(args.comm, Finding::kBadArrival, kPeerFailedCode, source, record, rank, came, count);
  }
  /// Calls body(rank, slot) in all lanes, for each rank that has one.
  template <class Body>
  __device__ void for_each(Body&& body) const {
    for_each_rank(set, at, body);
  }
};

/// The forwarder's part of the handle. False, and reported, if the record is none of its source's.
__device__ __forceinline__ bool note_record(const DispatchArgs& args, const Blocks& targets,
                                            const Arrival& row) {
  const Comm& comm = args.comm;
  const auto records = plan::part_of(targets.records, row.meta.node);
  const std::int64_t at = records.begin + row.record;
  if (row.record < 0 || at >= records.end || at != row.at || at >= args.routing.nvl_head_rows) {
    if (lane_id() == 0)
      Slots::report(args, row.source, row.record, -1, row.record, records.end - records.begin);
    return false;
  }
  std::int32_t* heads = args.routing.send_nvl_head + at * comm.num_ranks;
  bool same = true;
#pragma unroll
  for (int i = 0; i < kRanksALane; ++i) {
    const int rank = i * 32 + lane_id();
    if (rank >= comm.num_ranks) continue;
    if (args.fill_handle) heads[rank] = row.positions.at[i];
    same = same && (args.fill_handle || row.told[i] == row.positions.at[i]);
  }
  if (args.fill_handle && lane_id() == 0) args.work.arrived_tokens[at] = row.meta.token;
  if (__all_sync(0xffffffff, same)) return true;
  if (lane_id() == 0) raise(comm, Finding::kOtherHeads, kDisagreementCode, row.source, at);
  return false;
}

/// Entries for experts of other ranks become -1 with weight 0.
__device__ __forceinline__ void place_topk(const DispatchArgs& args, const Blocks& targets,
                                           const Arrival& row, const Slots& slots) {
  const int topk = args.comm.record.num_topk;
  const bool weighted = args.format.topk_weights_bytes != 0;
  const std::int64_t local_experts =
      topk == 0 ? 0 : args.comm.record.num_experts / args.rails.shape.topology.num_ranks;
  for (int base = 0; base < topk; base += 32) {
    const int k = base + lane_id();
    const bool more = base > 0 && k < topk;
    const std::int64_t id = more ? row.head.topk_idx[k] : row.id;
    const float weight = more && weighted ? row.head.topk_weights[k] : row.weight;
    slots.for_each([&](int rank, std::int64_t slot) {
      if (k >= topk) return;
      const std::int64_t local = id - args.comm.global_rank(rank) * local_experts;
      const bool here = id >= 0 && local >= 0 && local < local_experts;
      const plan::RecvArrays& to = targets.of[rank];
      const std::int64_t at = slot * topk + k;
      if (row.head.topk_idx.wide) {
        reinterpret_cast<std::int64_t*>(to.topk_idx)[at] = here ? local : -1;
      } else {
        reinterpret_cast<std::int32_t*>(to.topk_idx)[at] =
            here ? static_cast<std::int32_t>(local) : -1;
      }
      if (weighted) reinterpret_cast<float*>(to.topk_weights)[at] = here ? weight : 0.0f;
    });
  }
}

/// All but x.
__device__ __forceinline__ void place_small(const DispatchArgs& args, const Blocks& targets,
                                            const Arrival& row, const Slots& slots) {
  const std::uint64_t ranks = row.positions.ranks();
#pragma unroll
  for (int i = 0; i < kRanksALane; ++i) {
    if (slots.at[i] < 0) continue;
    const plan::RecvArrays& to = targets.of[i * 32 + lane_id()];
    to.src_idx[slots.at[i]] = row.meta.token;
    reinterpret_cast<plan::SourceMeta*>(to.src_meta)[slots.at[i]] = {row.meta.node, row.meta.token,
                                                                     ranks};
  }
  place_topk(args, targets, row, slots);
  const auto scales = static_cast<int>(args.format.scale_bytes / 4);
  const auto place_scale = [&](int s, std::uint32_t word) {
    slots.for_each([&](int rank, std::int64_t slot) {
      if (s < scales)
        reinterpret_cast<std::uint32_t*>(targets.of[rank].scales)[slot * scales + s] = word;
    });
  };
#pragma unroll
  for (int i = 0; i < Arrival::kScalesALane; ++i)
    if (i * 32 < scales) place_scale(i * 32 + lane_id(), row.scale[i]);
  for (int base = Arrival::kScalesALane * 32; base < scales; base += 32) {
    const int s = base + lane_id();
    place_scale(s, s < scales ? row.head.scales[s * row.head.scale_stride] : 0);
  }
}

/// By a warp: all of an item but x goes to the slots of the ranks that it names; returns these.
/// Only this rank writes these slots, behind the acquire in wait_place() (I5, I19).
__device__ __forceinline__ Slots place(const DispatchArgs& args, const Blocks& targets,
                                       const Arrival& row) {
  const bool good = row.piece != 0 || note_record(args, targets, row);
  const Slots slots(args, targets, row, good);
  if (row.piece == 0) place_small(args, targets, row, slots);
  return slots;
}

/// Where the part of x that a piece is goes at the i-th rank that a lane looks after, or null.
__device__ __forceinline__ std::byte* x_place(const DispatchArgs& args, const Blocks& targets,
                                              const Slots& slots, int piece, int i) {
  if (slots.at[i] < 0) return nullptr;
  return targets.of[i * 32 + lane_id()].x + slots.at[i] * args.format.x_bytes +
         args.item.x_begin(piece);
}

}  // namespace deep_ep::cuda::internode
