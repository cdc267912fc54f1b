#pragma once

#include "backend/cuda/device/sums.cuh"
#include "backend/cuda/internode/blocks.cuh"

// What happens to the rows of a combine inside a node: they are read where their ranks have them.
namespace deep_ep::cuda::internode {

/// What a warp sums, listed in shared memory.
struct Sources {
  const std::byte* rows[plan::kMaxRanksPerNode];  // this node's rows of a record, ascending ranks
  const float* weights[plan::kMaxRanksPerNode];
  const std::byte* addends[plan::kMaxNodes + 2];  // of a token: items of ascending nodes, biases
  const float* item_weights[plan::kMaxNodes];
};

/// A token's record at each node, or -1, the lane by which its sum comes from there, and how many
/// items that lane brought ahead of it, over all calls; lane i % 32 has those of node i.
class TokenRecords {
 public:
  __device__ TokenRecords(const CombineArgs& args, const Blocks& blocks, std::int64_t token) {
    const Rails& rails = args.rails;
    const int nodes = rails.shape.topology.num_nodes();
#pragma unroll
    for (int i = 0; i < kNodesALane; ++i) {
      const int node = i * 32 + lane_id();
      at_[i] = -1;
      if (node >= nodes) continue;
      at_[i] = args.send_rdma_head[token * nodes + node];
      if (node == rails.node || at_[i] < 0) continue;
      const auto record = static_cast<std::uint32_t>(at_[i]);
      const auto lanes = static_cast<std::uint32_t>(blocks.lanes[node]);
      const std::uint32_t before = record / lanes;
      lane_[i] = static_cast<int>(record - before * lanes);
      const std::int64_t ring = rails.ring(lane_[i], RailShape::peer_index(node, rails.node));
      items_[i] = rails.state.rings[ring].consumed +
                  std::uint64_t{before} * static_cast<std::uint32_t>(args.item.pieces);
    }
  }
  __device__ std::int32_t of(int node) const { return pick(at_, node); }
  __device__ int lane(int node) const { return pick(lane_, node); }
  __device__ std::uint64_t items(int node) const { return pick(items_, node); }

 private:
  static constexpr int kNodesALane = (plan::kMaxNodes + 31) / 32;

  template <class Value>
  __device__ static Value pick(const Value (&values)[kNodesALane], int node) {
    Value mine = values[0];
#pragma unroll
    for (int i = 1; i < kNodesALane; ++i) mine = node / 32 == i ? values[i] : mine;
    return __shfl_sync(0xffffffff, mine, node % 32);
  }

  std::int32_t at_[kNodesALane];
  int lane_[kNodesALane] = {};
  std::uint64_t items_[kNodesALane] = {};
};

/// Positions of a record's rows at the ranks that a lane looks after, or -1; an adding warp
/// loads them ahead of their use.
struct RecordHeads {
  std::int64_t number = -1;  // in send_nvl_head
  std::int32_t at[kRanksALane];

  __device__ void load(const CombineArgs& args, std::int64_t of) {
    number = of;
#pragma unroll
    for (int i = 0; i < kRanksALane; ++i) {
      const int rank = i * 32 + lane_id();
      at[i] = rank < args.comm.num_ranks ? args.send_nvl_head[of * args.comm.num_ranks + rank] : -1;
    }
  }
};

/// By a warp: lists the rows of a record, of a token of `source`. Returns how many there are, or
/// -1, and reported, if the handle is wrong.
__device__ inline int list_rows(const CombineArgs& args, const Blocks& blocks,
                                const RecordHeads& heads, int source, Sources& sources) {
  const Comm& comm = args.comm;
  __syncwarp();  // the list before has been read
  int found = 0;
  bool good = true;
#pragma unroll
  for (int i = 0; i < kRanksALane; ++i) {
    const int rank = i * 32 + lane_id();
    const std::int32_t head = heads.at[i];
    const std::uint32_t set = __ballot_sync(0xffffffff, head != -1);
    if (head != -1) {
      const auto rows = blocks.rows(args.rails, rank, source);
      good = head >= 0 && head < rows.end - rows.begin;
      if (!good)
        raise_invalid(comm, Finding::kBadNvlHead, heads.number, rank, head, rows.end - rows.begin);
      const std::int64_t row = rows.begin + head;
      const int at = found + __popc(set & ((1u << lane_id()) - 1));
      const plan::RecvArrays& block = blocks.of[rank];
      sources.rows[at] = block.x + row * args.format.x_bytes;
      sources.weights[at] =
          reinterpret_cast<const float*>(block.topk_weights) + row * args.comm.record.num_topk;
    }
    if (__all_sync(0xffffffff, good) == 0) return -1;
    found += __popc(set);
  }
  __syncwarp();
  return found;
}

/// Weight k, summed over this node's rows of a record.
__device__ inline float sum_weight(const Sources& sources, int rows, int k) {
  float sum = 0.0f;
  for (int i = 0; i < rows; ++i) sum = plan::add(sum, sources.weights[i][k]);
  return plan::from_float<float>(sum);
}

/// By a warp: the head of an item.
__device__ inline void compose_weights(const CombineArgs& args, const Sources& sources, int rows,
                                       std::byte* to) {
  const auto weights = static_cast<int>(args.format.topk_weights_bytes / 4);
  for (int k = lane_id(); k < weights; k += 32)
    reinterpret_cast<float*>(to)[k] = sum_weight(sources, rows, k);
}

}  // namespace deep_ep::cuda::internode
