#pragma once

#include "backend/cuda/device/places.cuh"
#include "backend/cuda/internode/rail.cuh"
#include "backend/cuda/intranode/exchange.cuh"

// Where the ranks of this node have the rows of a call, and who of them takes part in a record.
namespace deep_ep::cuda::internode {

/// Some threads of a block, in a row, whose own barrier is another one than that of all.
struct Threads {
  int first;
  int count;

  __device__ int index() const { return static_cast<int>(threadIdx.x) - first; }
  __device__ bool all(bool value) const { return barrier_and(value, first == 0 ? 0 : 1, count); }
};

/// What every row asks for, in shared memory: fences make a block forget what it has cached.
struct Blocks {
  static constexpr int kMostPrefix = 1024;

  // The arrays of each rank of the node: results of a dispatch, what a combine brings home.
  plan::RecvArrays of[plan::kMaxRanksPerNode];
  const std::int32_t* prefix;  // RailState::prefix: `prefix_here`, if it fits
  std::int32_t prefix_here[kMostPrefix];
  std::int32_t records[plan::kMaxNodes];  // RailState::records
  std::int32_t lanes[plan::kMaxNodes];    // RailState::lanes

  /// Rows of `source` at `rank` of the node.
  __device__ plan::RowRange rows(const Rails& rails, int rank, int source) const {
    return plan::part_of(prefix + std::int64_t{rank} * rails.shape.topology.num_ranks, source);
  }
  /// By a thread: the arrays of a rank, where it has them.
  template <class Args>
  __device__ void carve(const Args& args, int rank, std::byte* base, const Place& place) {
    std::byte* x = place.x_segment < 0
                       ? nullptr
                       : segment_base(args.comm, rank, place.x_segment) + place.x_offset;
    Carver carver(base);
    of[rank] = plan::RecvArrays::carve(carver, args.format, place.rows, x);
  }
  /// By the threads, ahead of a barrier.
  __device__ void keep(const Rails& rails, const Threads& threads) {
    const plan::Topology& topology = rails.shape.topology;
    const int length = topology.ranks_per_node * topology.num_ranks;
    const bool fits = length <= kMostPrefix;
    if (threads.index() == 0) prefix = fits ? prefix_here : rails.state.prefix;
    for (int i = threads.index(); fits && i < length; i += threads.count)
      prefix_here[i] = rails.state.prefix[i];
    for (int i = threads.index(); i < topology.num_nodes(); i += threads.count) {
      records[i] = rails.state.records[i];
      lanes[i] = rails.state.lanes[i];
    }
  }
};

/// By one thread: this rank's own block, whose place nobody has to tell it. It needs nothing of the
/// kernel before.
template <class Args>
__device__ void find_own(const Args& args, Blocks& blocks) {
  const Place place{.segment = args.block_segment,
                    .offset = args.block_offset,
                    .rows = args.block_rows,
                    .x_segment = args.x_segment,
                    .x_offset = args.x_offset};
  const int rank = args.comm.rank;
  blocks.carve(args, rank, segment_base(args.comm, rank, place.segment) + place.offset, place);
}

/// wait_place() of this rank's call, or null if there is a fault. Not inlined, since it takes
/// registers that loops need.
__device__ __noinline__ inline std::byte* wait_block(const Comm& comm, std::uint64_t epoch,
                                                     int rank, Place& place) {
  return may_start(comm) ? wait_place(comm, epoch, comm.record, rank, place) : nullptr;
}

/// By the threads, true in each: every other rank of the node has told where its block is, and
/// each, this one's too, has room for the rows that come there. fits(rank, rows, room) says so, or
/// reports.
template <class Args, class Fits>
__device__ bool find_blocks(const Args& args, std::uint64_t epoch, Blocks& blocks,
                            const Threads& threads, Fits&& fits) {
  const Comm& comm = args.comm;
  const int all = args.rails.shape.topology.num_ranks;
  if (blockIdx.x == 0 && comm.num_ranks > 1) {
    publish_place(comm, epoch, comm.record,
                  {.segment = args.block_segment,
                   .offset = args.block_offset,
                   .rows = args.block_rows,
                   .x_segment = args.x_segment,
                   .x_offset = args.x_offset},
                  threads.index(), threads.count);
  }
  blocks.keep(args.rails, threads);
  bool good = true;
  for (int i = threads.index(); good && i < comm.num_ranks; i += threads.count) {
    Place place;
    place.rows = args.block_rows;
    if (i == comm.rank) {
      good = may_start(comm);
    } else {
      std::byte* base = wait_block(comm, epoch, i, place);
      good = base != nullptr;
      if (good) blocks.carve(args, i, base, place);
    }
    good = good && fits(i, args.rails.state.prefix[(std::int64_t{i} + 1) * all - 1], place.rows);
  }
  return threads.all(good);
}

/// By all threads of the last block, true in each: what this rank's warps wrote is there, what the
/// other ranks of the node write here too, and nobody has a fault.
__device__ inline bool all_landed(const Comm& comm, std::uint64_t epoch) {
  // What is this rank's own the last block has acquired (is_last_block()).
  if (comm.num_ranks > 1 &&
      (__syncthreads_and(may_start(comm)) == 0 || !intranode::exchange_landed(comm, epoch)))
    return false;
  return __syncthreads_and(may_start(comm)) != 0;
}

/// By a warp whose lane i has at[s] of rank s * 32 + i, for the ranks in `set`, which all lanes
/// know: calls body(rank, at) in all lanes, in ascending rank.
template <class Index, class Body>
__device__ void for_each_rank(const std::uint32_t (&set)[kRanksALane],
                              const Index (&at)[kRanksALane], Body&& body) {
#pragma unroll
  for (int i = 0; i < kRanksALane; ++i) {
    for (std::uint32_t left = set[i]; left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      body(i * 32 + lane, __shfl_sync(0xffffffff, at[i], lane));
    }
  }
}

}  // namespace deep_ep::cuda::internode
