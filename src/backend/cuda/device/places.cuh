#pragma once

#include "backend/cuda/arrays.hpp"
#include "backend/cuda/device/waiting.cuh"
#include "plan/recv_arrays.hpp"

// Step one of a kernel that moves rows: every rank tells every other where its rows go and what it
// called with.
namespace deep_ep::cuda {

/// Where a rank's rows go: its segment, and the rows that the block was carved for.
struct Place {
  int segment;
  std::int64_t offset;
  std::int64_t rows;
  int num_channels = 0;  // of the handle to be filled, 0: none
  int handle_segment = 0;
  std::int64_t handle_offset = 0;
  int x_segment = -1;  // of rows of x that do not go to the block
  std::int64_t x_offset = 0;
};

/// By one warp: a hash of the handle's rank_prefix_matrix [R, R] that depends on every element and
/// its place.
__device__ inline std::uint64_t warp_hash(const std::int32_t* matrix, int num_ranks) {
  std::uint64_t sum = 0;
  for (int i = threadIdx.x % 32; i < num_ranks * num_ranks; i += 32) {
    // splitmix64 of place and element.
    std::uint64_t x = (std::uint64_t(i) << 32 | std::uint32_t(matrix[i])) + 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    sum += x ^ x >> 31;
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  return sum;
}

/// By `threads` threads of one block, this one the thread-th: this rank's place and record, to all.
/// Nobody reads the block that the place names (it comes from the heap, behind its last readers),
/// and no sender reads the place of two kernels ago any more (I3).
__device__ inline void publish_place(const Comm& comm, std::uint64_t epoch,
                                     const protocol::CallRecord& record, const Place& own,
                                     unsigned thread = threadIdx.x, unsigned threads = blockDim.x) {
  for (unsigned i = thread; i < static_cast<unsigned>(comm.num_ranks); i += threads) {
    const int source = (comm.rank + 1 + static_cast<int>(i)) % comm.num_ranks;
    const DeviceControl there = comm.control(source);
    there.block.mailbox_of(epoch).record[comm.rank] = record;
    protocol::InboxPlace& place = there.place(epoch, comm.rank, comm.num_ranks);
    place.segment = own.segment;
    place.offset = own.offset;
    place.rows = own.rows;
    place.num_channels = own.num_channels;
    place.handle_segment = own.handle_segment;
    place.handle_offset = own.handle_offset;
    place.x_segment = own.x_segment;
    place.x_offset = own.x_offset;
    // release: pairs with the acquire in wait_place() of the source.
    place.ready.publish(epoch);
  }
}

/// Base of a segment as mapped here, or null while it is not.
__device__ inline std::byte* segment_base(const Comm& comm, int rank, int segment) {
  if (segment < 0 || segment >= comm.num_segments) return nullptr;
  const std::int64_t i = std::int64_t{rank} * comm.num_segments + segment;
  auto* known = reinterpret_cast<std::uint64_t*>(comm.known_segments + i);
  std::uint64_t base = protocol::load_relaxed(known);
  if (base == 0) {
    // acquire: pairs with Context::set_base, behind the mapping. Host memory is far away, so the
    // word is kept here; the store carries no order, because whoever reads it only needs the
    // address, which was mapped before.
    base = protocol::load_acquire(reinterpret_cast<const std::uint64_t*>(comm.mapped_segments + i));
    if (base != 0) protocol::store_relaxed(known, base);
  }
  return reinterpret_cast<std::byte*>(base);
}

/// By one thread: waits until `rank` has published its place and its segments are mapped here, and
/// notes how long. Returns the base of the block, or null if the wait failed or the ranks disagree.
__device__ inline std::byte* wait_place(const Comm& comm, std::uint64_t epoch,
                                        const protocol::CallRecord& record, int rank) {
  const DeviceControl own = comm.control(comm.rank);
  const protocol::InboxPlace& place = own.place(epoch, rank, comm.num_ranks);
  std::byte* base = nullptr;
  const long long begin = clock64();
  const bool ready = wait_for(
      comm, rank, Wait::kPlace, epoch,
      [&] {
        // acquire: pairs with publish_place() of the receiver.
        if (!place.ready.reached(epoch)) return false;
        base = segment_base(comm, rank, place.segment);
        return base != nullptr &&
               (place.num_channels == 0 ||
                segment_base(comm, rank, place.handle_segment) != nullptr) &&
               (place.x_segment < 0 || segment_base(comm, rank, place.x_segment) != nullptr);
      },
      [&] { return place.ready.seen(); });
  note_wait(comm, rank, begin);
  if (!ready ||
      !agrees(comm, record, own.block.mailbox_of(epoch).record[rank], comm.global_rank(rank)))
    return nullptr;
  return base + place.offset;
}

/// By all threads of `blocks` blocks: results that are not there are not a number, and of no
/// expert, so that nobody takes what the memory holds for results.
__device__ inline void void_block(const Comm& comm, const DispatchStepArgs& args, int block,
                                  int blocks) {
  const std::int64_t step = std::int64_t{blocks} * blockDim.x;
  const std::int64_t begin = block * std::int64_t{blockDim.x} + threadIdx.x;
  const auto make_void = [&](int segment, std::int64_t offset, std::int64_t bytes) {
    auto* words = reinterpret_cast<uint4*>(segment_base(comm, comm.rank, segment) + offset);
    for (std::int64_t i = begin; i < bytes / 16; i += step)
      words[i] = {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff};
  };
  const bool x_is_there = args.x_segment < 0;
  make_void(
      args.block_segment, args.block_offset,
      plan::RecvArrays::bytes(x_is_there ? args.format : args.format.without_x(), args.block_rows));
  if (!x_is_there) make_void(args.x_segment, args.x_offset, args.block_rows * args.format.x_bytes);
}

/// False, and reported, unless rows [first, first + count) of `rank` lie in its block.
__device__ inline bool check_rows_fit(const Comm& comm, int rank, std::int64_t first,
                                      std::int64_t count, std::int64_t room) {
  if (first >= 0 && count >= 0 && first + count <= room) return true;
  raise_invalid(comm, Finding::kBadMatrix, rank, first + count, room);
  return false;
}

}  // namespace deep_ep::cuda
