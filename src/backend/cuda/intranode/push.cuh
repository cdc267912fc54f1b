#pragma once

#include "backend/cuda/device/pump.cuh"
#include "backend/cuda/device/telling.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/intranode/steps.hpp"

// How combine brings rows home: some warps of a block push them, piece by piece, and one tells
// which pieces are there.
namespace deep_ep::cuda::intranode {

constexpr int kPushWarps = 2;
// So many warps fill the link. With more of them sums wait longer for memory: see
// docs/performance.md. But so few bytes are pushed before sums can begin, by all warps soonest.
constexpr int kPushLinkWarps = 20;
constexpr std::int64_t kFewBytes = 6 << 20;

/// log2 of the rows of a piece: as few as kMaxChunks pieces allow, since sums begin piece by piece.
__device__ inline int chunk_shift(std::int64_t count) {
  constexpr int kMaxChunksShift = 31 - __builtin_clz(kMaxChunks);
  return count > kMaxChunks ? 32 - __clz(static_cast<int>(count - 1) >> kMaxChunksShift) : 0;
}

/// One other rank, as source of the rows that this one pushes, and as owner of rows that come here.
struct Other {
  // This rank's rows for it: from x_row on in x, to these places in its inbox.
  std::int64_t x_row;
  std::int64_t push_rows;
  int push_shift;  // of their pieces
  std::byte* to_x;
  std::byte* to_weights;
  // Its rows for this rank, in this rank's inbox.
  std::int64_t count;
  int count_shift;
  const std::byte* from_x;
  const std::byte* from_weights;
};

/// Part of a piece on its way home.
struct PushNote {
  std::byte* to;
  std::uint32_t bytes;
  std::uint16_t source;
  std::int16_t chunk;  // -1: not the last part
};
// A piece counts as complete a few parts after its last one: so nobody waits for its stores.
using PushPump = Pump<6, 7168, 2, PushNote, 6>;

/// Pieces that a push warp has completed: source << 16 | chunk.
using PushedPieces = Untold<std::uint32_t, 32>;

/// By a push warp: the parts of its pieces, of all sources in turn, so that all of them can begin
/// to sum.
class PushQueue {
 public:
  /// The warp is the i-th of `warps`. `others` [R]
  __device__ PushQueue(const CombineArgs& args, const Other* others, int i, int warps)
      : args_(args),
        others_(others),
        num_others_(args.comm.num_ranks - 1),
        row_bytes_(static_cast<std::uint32_t>(args.format.x_bytes)),
        source_(i % num_others_),
        chunk_(i / num_others_),
        source_step_(warps % num_others_),
        chunk_step_(warps / num_others_) {
    for (int rank = 0; rank < args.comm.num_ranks; ++rank) {
      if (rank == args.comm.rank || others[rank].push_rows == 0) continue;
      const auto last = static_cast<int>((others[rank].push_rows - 1) >> others[rank].push_shift);
      num_chunks_ = max(num_chunks_, last + 1);
    }
  }

  __device__ bool operator()(Piece& piece, PushNote& note) {
    if (left_ == 0 && !next_chunk()) return false;
    const auto bytes = static_cast<std::uint32_t>(min(left_, std::int64_t{PushPump::kStageBytes}));
    piece = {from_, bytes};
    left_ -= bytes;
    note = {to_, bytes, of_, static_cast<std::int16_t>(left_ == 0 ? of_chunk_ : -1)};
    from_ += bytes;
    to_ += bytes;
    return true;
  }

 private:
  __device__ bool next_chunk() {
#pragma unroll 1
    while (chunk_ < num_chunks_) {
      int rank = args_.comm.rank + 1 + source_;
      if (rank >= args_.comm.num_ranks) rank -= args_.comm.num_ranks;
      of_ = static_cast<std::uint16_t>(rank);
      of_chunk_ = chunk_;
      source_ += source_step_;
      chunk_ += chunk_step_;
      if (source_ >= num_others_) {
        source_ -= num_others_;
        ++chunk_;
      }
      const Other& other = others_[rank];
      const std::int64_t begin = std::int64_t{of_chunk_} << other.push_shift;
      const std::int64_t rows = min(other.push_rows - begin, std::int64_t{1} << other.push_shift);
      if (rows <= 0) continue;
      // Consecutive at both ends.
      from_ = args_.x + (other.x_row + begin) * row_bytes_;
      to_ = other.to_x + begin * row_bytes_;
      left_ = rows * row_bytes_;
      if (args_.topk_weights != nullptr) push_weights(other, begin, rows);
      return true;
    }
    return false;
  }

  __device__ void push_weights(const Other& other, std::int64_t begin, std::int64_t rows) const {
    const std::int64_t topk = args_.comm.record.num_topk;
    const float* weights = args_.topk_weights + (other.x_row + begin) * topk;
    float* there = reinterpret_cast<float*>(other.to_weights) + begin * topk;
    for (std::int64_t i = threadIdx.x % 32; i < rows * topk; i += 32) there[i] = weights[i];
  }

  const CombineArgs& args_;
  const Other* others_;
  int num_others_;
  std::uint32_t row_bytes_;
  int num_chunks_ = 0;  // of the source that has most
  // What comes next, the source counted from this rank on, and how far it is to what follows.
  int source_;
  int chunk_;
  int source_step_;
  int chunk_step_;
  // What is under way.
  std::uint16_t of_ = 0;
  int of_chunk_ = 0;
  const std::byte* from_ = nullptr;
  std::byte* to_ = nullptr;
  std::int64_t left_ = 0;
};

/// Warps of the grid that push.
__device__ inline int push_warps(const CombineArgs& args, const Other* others) {
  const int all = kPushWarps * static_cast<int>(gridDim.x);
  std::int64_t rows = 0;
  for (int rank = 0; rank < args.comm.num_ranks; ++rank)
    if (rank != args.comm.rank) rows += others[rank].push_rows;
  return rows * args.format.x_bytes <= kFewBytes ? all : min(kPushLinkWarps, all);
}

/// By the warp-th push warp of a block: its pieces.
__device__ inline void push_rows(const CombineArgs& args, const Other* others, int warp,
                                 PushPump::Storage& storage, PushedPieces& pushed) {
  const auto blocks = static_cast<int>(gridDim.x);
  const int i = warp * blocks + static_cast<int>(blockIdx.x);
  const int warps = push_warps(args, others);
  const bool leader = threadIdx.x % 32 == 0;
  if (i < warps && args.comm.num_ranks > 1) {
    PushQueue queue(args, others, i, warps);
    PushPump pump(storage);
    std::uint32_t count = 0;
    std::uint32_t told = 0;
    pump.run(
        queue, [](const PushNote& note, bool) { return note; },
        [&](const std::byte* from, const PushNote& note) {
          if (leader) bulk_store(note.to, from, note.bytes);
        },
        [&](const PushNote& note) {
          // The piece's weights are from before a barrier of the warp.
          if (leader && note.chunk >= 0)
            pushed.put(count++, std::uint32_t{note.source} << 16 | std::uint16_t(note.chunk), told);
        });
  }
  if (leader) pushed.end();
}

/// By one warp of a block: tells the sources what the push warps have completed.
__device__ inline void tell_pieces(const CombineArgs& args, PushedPieces (&pushed)[kPushWarps],
                                   std::uint64_t epoch) {
  tell_all<false>(pushed, [&](std::uint32_t piece) {
    // Pairs with the acquire in wait_chunk() of the source.
    std::uint64_t* words = args.comm.control(static_cast<int>(piece >> 16)).chunks;
    protocol::store_relaxed(words + std::int64_t{args.comm.rank} * kMaxChunks + (piece & 0xffff),
                            epoch);
  });
}

}  // namespace deep_ep::cuda::intranode
