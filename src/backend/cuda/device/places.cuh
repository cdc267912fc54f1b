#pragma once

#include "backend/cuda/arrays.hpp"
#include "backend/cuda/device/packets.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "plan/recv_arrays.hpp"

// Step one of a kernel that moves rows: every rank tells every other where its rows go and what it
// called with.
namespace deep_ep::cuda {

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

/// The tag of a place's packets. Memory that was never written has no tag, and what a kernel of two
/// epochs ago wrote another one.
__device__ inline std::uint32_t place_tag(std::uint64_t epoch) {
  return static_cast<std::uint32_t>(epoch) << 1 | 1;
}

/// By `threads` threads of one block, this one the thread-th: this rank's place and record, to all,
/// in packets.
/// Nobody reads the block that the place names (it comes from the heap, behind its last readers: an
/// earlier kernel, whose loads have returned), and no sender reads the place of two kernels ago any
/// more (I3).
__device__ inline void publish_place(const Comm& comm, std::uint64_t epoch,
                                     const protocol::CallRecord& record, const Place& own,
                                     int thread = static_cast<int>(threadIdx.x),
                                     int threads = static_cast<int>(blockDim.x)) {
  const auto* place_words = reinterpret_cast<const std::uint32_t*>(&own);
  const auto* record_words = reinterpret_cast<const std::uint32_t*>(&record);
  const auto word = [&](int i) -> std::uint32_t {
    if (i < PlaceMessage::kPlaceWords) return place_words[i];
    i -= PlaceMessage::kPlaceWords;
    return i < PlaceMessage::kRecordWords ? record_words[i] : 0;
  };
#pragma unroll 1
  for (int i = thread; i < comm.num_ranks * PlaceMessage::kPackets; i += threads) {
    const int source = (comm.rank + 1 + i / PlaceMessage::kPackets) % comm.num_ranks;
    const int packet = i % PlaceMessage::kPackets;
    send_packet(comm.control(source).place(epoch, comm.rank, comm.num_ranks) + packet,
                word(packet * 3), word(packet * 3 + 1), word(packet * 3 + 2), place_tag(epoch));
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

/// True, and the words of a place's packets, once all of them are of the epoch.
__device__ inline bool take_place(const plan::Packet* from, std::uint64_t epoch,
                                  std::uint32_t (&words)[3 * PlaceMessage::kPackets]) {
  bool here = true;
#pragma unroll
  for (int i = 0; i < PlaceMessage::kPackets; ++i) {
    plan::Packet packet;
    here = take_packet(from + i, place_tag(epoch), packet) && here;
#pragma unroll
    for (int w = 0; w < 3; ++w) words[3 * i + w] = packet.words[w];
  }
  return here;
}

/// By one thread: waits until `rank` has published its place and its segments are mapped here, and
/// notes how long. Returns the base of the block, or null if the wait failed or the ranks disagree.
/// What is written there depends on what the place says, and so comes behind it.
__device__ inline std::byte* wait_place(const Comm& comm, std::uint64_t epoch,
                                        const protocol::CallRecord& record, int rank,
                                        Place& place) {
  const plan::Packet* from = comm.control(comm.rank).place(epoch, rank, comm.num_ranks);
  std::uint32_t words[3 * PlaceMessage::kPackets];
  const long long begin = clock64();
  bool ready = wait_for(
      comm, rank, Wait::kPlace, epoch, [&] { return take_place(from, epoch, words); },
      [] { return 0; });
  note_wait(comm, rank, begin);
  if (!ready) return nullptr;
  protocol::CallRecord theirs = {};
  memcpy(&place, words, sizeof place);
  memcpy(&theirs, words + PlaceMessage::kPlaceWords, PlaceMessage::kRecordWords * 4);
  std::byte* base = nullptr;
  ready = wait_for(
      comm, rank, Wait::kPlace, epoch,
      [&] {
        base = segment_base(comm, rank, place.segment);
        return base != nullptr &&
               (place.num_channels == 0 ||
                segment_base(comm, rank, place.handle_segment) != nullptr) &&
               (place.x_segment < 0 || segment_base(comm, rank, place.x_segment) != nullptr);
      },
      [] { return 0; });
  if (!ready || !agrees(comm, record, theirs, comm.global_rank(rank))) return nullptr;
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
