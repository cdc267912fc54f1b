#pragma once

#include "backend/cuda/device/pump.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/intranode/steps.hpp"
#include "plan/layout.hpp"

// Which rows of x a warp of dispatch moves, and to whom.
namespace deep_ep::cuda::intranode {

// Warps of a block that move rows of x, each with six stages of half a row of 7168 BF16 values.
constexpr int kRowWarps = 4;

// So many warps fill the link to other GPUs, beside those for this GPU's memory on the same SMs or
// apart from them. With more, writes to this GPU queue behind those to others: see
// docs/performance.md.
constexpr int kLinkWarps = 30;
constexpr int kLinkWarpsApart = 32;
// An SM writes about a seventh of what the link carries. With so few of them that this is what
// limits, every row is read once, by a warp that sends it to all of its ranks.
constexpr int kLinkSms = 7;

/// What a lane knows of a piece of a row on its way, for the ranks that it looks after (rank % 32
/// == lane): the position among this rank's rows for that rank, or -1.
template <int kRanksALane>
struct alignas(16) RowNote {
  std::uint32_t at;  // of the piece in the row, in bytes
  std::uint32_t bytes;
  std::int32_t token;
  std::int32_t head[kRanksALane];
};
template <int kRanksALane>
using RowPump = Pump<6, 7168, 2, RowNote<kRanksALane>>;

/// A warp's share: every stride-th token from `first` on, `count` of them, to these ranks.
struct RowShare {
  int first;
  int stride;
  int count;
  bool own;
  bool others;
};

/// By a row warp of the grid: its share. How they are cut has no influence but on speed.
__device__ inline RowShare share_of(const DispatchArgs& args, int warp) {
  const Comm& comm = args.comm;
  float own = 0;
  float others = 0;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < comm.num_ranks; i += 32) {
    const auto rows = plan::rows_from(args.rank_prefix_matrix, comm.rank, i, comm.num_ranks);
    (i == comm.rank ? own : others) += static_cast<float>(rows.end - rows.begin);
  }
#pragma unroll 1
  for (int step = 16; step > 0; step /= 2) {
    own += __shfl_xor_sync(0xffffffff, own, step);
    others += __shfl_xor_sync(0xffffffff, others, step);
  }
  const auto tokens = static_cast<int>(comm.record.num_tokens);
  const auto blocks = static_cast<int>(gridDim.x);
  const int warps = blocks * kRowWarps;
  const int i = warp * blocks + static_cast<int>(blockIdx.x);
  const auto share = [&](int index, int size, bool to_own, bool to_others) {
    const auto left = static_cast<unsigned>(tokens - index + size - 1);
    const int count = index < tokens ? static_cast<int>(left / static_cast<unsigned>(size)) : 0;
    return RowShare{index, size, count, to_own, to_others};
  };
  const bool few = static_cast<float>(blocks) * others < kLinkSms * (own + others);
  if (own <= 0 || others <= 0 || few) return share(i, warps, true, true);
  // A piece on its way to several ranks is as many on the link.
  const float copies = max(1.0f, others / static_cast<float>(tokens));
  // On SMs of their own, two warps each, if there are so many; and of the others as many as end at
  // the same time, since with more both kinds wait for memory.
  const int apart = max(2, static_cast<int>(kLinkWarpsApart / copies));
  const int apart_blocks = (apart + 1) / 2;
  const auto enough = static_cast<int>(min(1.05f * kLinkWarpsApart * own / others, 65536.0f)) + 1;
  if ((blocks - apart_blocks) * kRowWarps >= enough) {
    const auto block = static_cast<int>(blockIdx.x);
    const bool remote = block < apart_blocks;
    const int of = remote ? warp * apart_blocks + block
                          : warp * (blocks - apart_blocks) + block - apart_blocks;
    const int size = remote ? apart : enough;
    return share(of < size ? of : tokens, size, !remote, remote);
  }
  const float part = static_cast<float>(warps) * others / (own + others);
  // Each kind has one at least, however little its part.
  const int remote = min(warps - 1, max(1, static_cast<int>(min(kLinkWarps / copies, part))));
  return i < remote ? share(i, remote, false, true)
                    : share(i - remote, warps - remote, true, false);
}

/// By a warp: the pieces of its rows, one after the other. Which ranks a token goes to is on its
/// way well before anybody asks.
template <int kRanksALane>
class RowQueue {
 public:
  static constexpr int kAhead = 8;  // tokens
  using Heads = std::int32_t[kAhead][kRanksALane * 32];
  using Pump = RowPump<kRanksALane>;

  __device__ RowQueue(const DispatchArgs& args, const RowShare& share, Heads& heads)
      : ring_(heads),
        num_ranks_(args.comm.num_ranks),
        row_bytes_(static_cast<std::uint32_t>(args.format.x_bytes)),
        at_(row_bytes_),
        from_(args.x + (std::int64_t{share.first} - share.stride) * args.format.x_bytes),
        step_(share.stride * args.format.x_bytes),
        heads_(args.send_head + std::int64_t{share.first} * num_ranks_ + lane()),
        heads_step_(std::int64_t{share.stride} * num_ranks_),
        token_(share.first - share.stride),
        stride_(share.stride),
        left_(share.count),
        to_fetch_(share.count) {
#pragma unroll
    for (int set = 0; set < kRanksALane; ++set) {
      const int rank = set * 32 + lane();
      wanted_[set] = rank < num_ranks_ && (rank == args.comm.rank ? share.own : share.others);
    }
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) fetch();
  }

  __device__ bool operator()(Piece& piece, RowNote<kRanksALane>& note) {
    if (at_ >= row_bytes_ && !next_token()) return false;
    piece.from = from_ + at_;
    piece.bytes = min(row_bytes_ - at_, Pump::kStageBytes);
    note.at = at_;
    note.bytes = piece.bytes;
    note.token = token_;
#pragma unroll
    for (int set = 0; set < kRanksALane; ++set) note.head[set] = head_[set];
    at_ += Pump::kStageBytes;
    return true;
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  /// The next token that goes to one of the share's ranks.
  __device__ bool next_token() {
    bool found = false;
#pragma unroll 1
    while (!found) {
      if (left_ == 0) return false;
      --left_;
      token_ += stride_;
      from_ += step_;
      async_copy_wait_group<kAhead - 1>();
#pragma unroll
      for (int set = 0; set < kRanksALane; ++set) {
        head_[set] = wanted_[set] ? ring_[slot_][set * 32 + lane()] : -1;
        found = found || head_[set] != -1;
      }
      found = __any_sync(0xffffffff, found);
      fetch();
    }
    at_ = 0;
    return true;
  }

  /// In place of the heads that were read last.
  __device__ void fetch() {
    if (to_fetch_ > 0) {
#pragma unroll
      for (int set = 0; set < kRanksALane; ++set)
        if (wanted_[set]) async_copy_4(&ring_[slot_][set * 32 + lane()], heads_ + set * 32);
      --to_fetch_;
      heads_ += heads_step_;
    }
    async_copy_commit_group();
    slot_ = (slot_ + 1) % kAhead;
  }

  Heads& ring_;
  int num_ranks_;
  std::uint32_t row_bytes_;
  std::uint32_t at_;
  const std::byte* from_;
  std::int64_t step_;
  const std::int32_t* heads_;
  std::int64_t heads_step_;
  int token_;
  int stride_;
  int left_;
  int to_fetch_;
  int slot_ = 0;
  bool wanted_[kRanksALane];
  std::int32_t head_[kRanksALane];
};

}  // namespace deep_ep::cuda::intranode
