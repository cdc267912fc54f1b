#pragma once

#include "backend/cuda/device/sum_up.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/internode/rail.cuh"

// What notify makes of the announcements: the counts by which the kernel behind it goes.
namespace deep_ep::cuda::internode {

/// What a rank of another node has announced.
__device__ inline const Announcement& message_of(const Rails& rails, std::uint64_t number,
                                                 int node) {
  return *reinterpret_cast<const Announcement*>(rails.block.mailbox[number % 2].messages +
                                                RailShape::peer_index(node, rails.node) *
                                                    rails.block.message_bytes);
}

/// Rows and tokens of the sources, as the ranks of the node have told them. A rank that has its
/// node for itself has all announcements.
class Told {
 public:
  __device__ Told(const NotifyArgs& args, std::uint64_t epoch, std::uint64_t number)
      : rails_(args.rails),
        own_(args.comm.record),
        width_(args.comm.num_ranks + 1),
        number_(number),
        rows_(args.comm.control(args.comm.rank).block.mailbox_of(epoch).tokens_per_rank) {}
  /// Of `source`, counted over all nodes, for a rank of this node.
  __device__ std::int32_t rows(int source, int to) const {
    if (width_ > 2) return rows_[row_of(source) + to];
    return source == rails_.rank() ? rails_.state.totals[source]
                                   : message_of(rails_, number_, source).rows[0];
  }
  __device__ std::int32_t tokens(int source) const {
    if (width_ > 2) return rows_[row_of(source) + width_ - 1];
    const auto& record =
        source == rails_.rank() ? own_ : message_of(rails_, number_, source).record;
    return static_cast<std::int32_t>(record.num_tokens);
  }
  /// Of the rail peers up to `node`'s and of this rank.
  __device__ std::int32_t records(int node) const {
    const RailShape& shape = rails_.shape;
    return node == rails_.node ? rails_.state.totals[shape.topology.num_ranks + node]
                               : message_of(rails_, number_, node).records;
  }

 private:
  __device__ std::int64_t row_of(int source) const {
    const plan::Topology& topology = rails_.shape.topology;
    return (std::int64_t{topology.index_of(source)} * topology.num_nodes() +
            topology.node_of(source)) *
           width_;
  }

  const Rails& rails_;
  const protocol::CallRecord& own_;
  int width_;
  std::uint64_t number_;
  const std::int32_t* rows_;  // [ranks of the node, nodes, width]
};

/// Reports a part of a handle that does not fit what the ranks send.
__device__ inline void require_same(const NotifyArgs& args, int tensor, int i, std::int32_t mine,
                                    std::int64_t theirs, int source) {
  if (mine != theirs)
    raise(args.comm, Finding::kOtherHandle, kDisagreementCode, source, tensor, i, mine, theirs);
}

/// By a warp: sum_up() of counts; false in each lane if one, or a sum, is none of 32 bits.
template <class Value, class Body>
__device__ bool sum_counts(int count, std::int64_t& sum, Value&& value, Body&& body) {
  bool good = true;
  sum = sum_up(count, value, [&](int i, std::int64_t own, std::int64_t upto) {
    good = good && own >= 0 && upto <= INT32_MAX;
    body(i, upto);
  });
  return __all_sync(0xffffffff, good) != 0;
}

/// By a warp: rows of all sources for a rank of the node.
__device__ inline void read_rows(const NotifyArgs& args, const Told& told, int to) {
  const Rails& rails = args.rails;
  const int all = rails.shape.topology.num_ranks;
  const bool own = to == args.comm.rank;
  std::int32_t* own_sums = args.routing.recv_gbl_rank_prefix_sum;
  std::int64_t rows = 0;
  const bool good = sum_counts(
      all, rows, [&](int source) { return told.rows(source, to); },
      [&](int source, std::int64_t sum) {
        rails.state.prefix[to * all + source] = static_cast<std::int32_t>(sum);
        if (!own) return;
        rails.state.num_tokens[source] = told.tokens(source);
        if (own_sums == nullptr) return;
        if (!args.cached) own_sums[source] = static_cast<std::int32_t>(sum);
        require_same(args, 0, source, own_sums[source], sum, source);
      });
  if (lane_id() != 0) return;
  if (!good) raise_invalid(args.comm, Finding::kTooManyRows, args.comm.global_rank(to));
  if (own && args.cached && rows > args.handle_rows)
    raise_invalid(args.comm, Finding::kHandleRoom, 0, args.handle_rows, rows);
}

/// By a warp: records of all nodes. They go to the handle, and to who may wait for them.
__device__ inline void read_records(const NotifyArgs& args, const Told& told) {
  const Rails& rails = args.rails;
  const plan::Topology& topology = rails.shape.topology;
  std::int32_t* own_sums = args.routing.recv_rdma_rank_prefix_sum;
  std::int64_t records = 0;
  const bool good = sum_counts(
      topology.num_nodes(), records, [&](int node) { return told.records(node); },
      [&](int node, std::int64_t sum) {
        rails.state.records[node] = static_cast<std::int32_t>(sum);
        if (own_sums == nullptr) return;
        if (!args.cached) own_sums[node] = static_cast<std::int32_t>(sum);
        require_same(args, 1, node, own_sums[node], sum, topology.rank_of(node, rails.index));
      });
  if (lane_id() != 0) return;
  if (!good) raise_invalid(args.comm, Finding::kTooManyRows, rails.rank());
  if (args.cached && records > args.routing.nvl_head_rows)
    raise_invalid(args.comm, Finding::kHandleRoom, 1, args.routing.nvl_head_rows, records);
}

/// By all threads of a block, in warps: what the kernel behind this one goes by.
__device__ inline void read_counts(const NotifyArgs& args, const Told& told, std::uint64_t number) {
  const Rails& rails = args.rails;
  const plan::Topology& topology = rails.shape.topology;
  const auto warp = static_cast<int>(threadIdx.x / 32);
  const auto warps = static_cast<int>(blockDim.x / 32);
  for (int node = threadIdx.x; node < topology.num_nodes(); node += blockDim.x)
    if (node != rails.node) rails.state.lanes[node] = message_of(rails, number, node).lanes;
  for (int to = warp; to < args.comm.num_ranks; to += warps) read_rows(args, told, to);
  if (warp == warps - 1) read_records(args, told);
  __syncthreads();
  if (threadIdx.x != 0 || args.max_rows == 0) return;
  const std::int64_t rows = rails.state.prefix[(args.comm.rank + 1) * topology.num_ranks - 1];
  const std::int64_t records = rails.state.records[topology.num_nodes() - 1];
  if (rows > args.max_rows || records > args.max_rows)
    raise(args.comm, Finding::kNodeCapacity, kCapacityCode, args.rails.rank(), rows, records,
          args.max_rows);
}

}  // namespace deep_ep::cuda::internode
