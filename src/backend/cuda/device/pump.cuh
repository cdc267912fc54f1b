#pragma once

#include "backend/cuda/device/ptx.cuh"

namespace deep_ep::cuda {

/// A warp's pipeline through shared memory: pieces come in by bulk copies, each on its stage's
/// barrier, and go out by bulk copies, to one or several places. Loads run kStages - 1 pieces ahead
/// of the stores. What a lane has to know of a piece in order to store it (its Note) is fetched a
/// piece earlier than that, so that nobody waits for it either.
template <int kStageCount, int kBytes, class LaneNote>
class Pump {
 public:
  static constexpr int kStages = kStageCount;
  static constexpr int kStageBytes = kBytes;
  using Note = LaneNote;
  struct Storage {
    alignas(128) std::byte stages[kStages][kStageBytes];
    std::uint64_t barriers[kStages];
    Note notes[kStages][32];
  };

  /// By the whole warp.
  __device__ explicit Pump(Storage& storage) : storage_(storage) {
    if (lane() == 0) {
      for (std::uint64_t& barrier : storage_.barriers) mbarrier_init(&barrier, 1);
      fence_mbarrier_init_release_cluster();
    }
    __syncwarp();
  }

  /// Moves pieces 0 .. count-1. For each, source(i) gives a Piece and note(i) the lane's Note; both
  /// are called by every lane. store(i, from, bytes, note) issues the bulk stores that the lane
  /// looks after. Returns when all stages may be filled again; finish() waits for the stores
  /// themselves.
  template <class Source, class TakeNote, class Store>
  __device__ void run(std::int64_t count, Source&& source, TakeNote&& take_note, Store&& store) {
    const std::int64_t ahead = count < kStages - 1 ? count : kStages - 1;
    for (std::int64_t i = 0; i < ahead; ++i) load(source(i), take_note(i));
    Note next = ahead < count ? take_note(ahead) : Note{};
    for (std::int64_t i = 0; i < count; ++i) {
      const int stage = static_cast<int>(stored_ % kStages);
      while (
          !mbarrier_try_wait_parity_acquire_cta(&storage_.barriers[stage], stored_ / kStages % 2)) {
      }
      store(i, storage_.stages[stage], source(i).bytes, storage_.notes[stage][lane()]);
      bulk_commit_group();
      ++stored_;
      const std::int64_t fill = i + kStages - 1;
      if (fill >= count) continue;
      // The stage that is filled next was read by the stores before these.
      bulk_wait_group_read<1>();
      __syncwarp();
      load(source(fill), next);
      if (fill + 1 < count) next = take_note(fill + 1);
    }
    bulk_wait_group_read<0>();
    __syncwarp();
  }

  /// By the whole warp: everything stored so far is complete and visible to the lanes that stored
  /// it.
  __device__ void finish() {
    bulk_wait_group<0>();
    __syncwarp();
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  template <class Piece>
  __device__ void load(const Piece& piece, const Note& note) {
    const int stage = static_cast<int>(loaded_ % kStages);
    ++loaded_;
    storage_.notes[stage][lane()] = note;  // read by the same lane only
    if (lane() != 0) return;
    mbarrier_arrive_expect_tx(&storage_.barriers[stage], piece.bytes);
    bulk_load(storage_.stages[stage], piece.from, piece.bytes, &storage_.barriers[stage]);
  }

  Storage& storage_;
  std::uint32_t loaded_ = 0;
  std::uint32_t stored_ = 0;
};

/// What a source of Pump::run gives.
struct Piece {
  const std::byte* from;
  std::uint32_t bytes;
};

/// Piece `i` of consecutive bytes.
template <int kStageBytes>
__device__ inline Piece piece_of(const std::byte* from, std::int64_t bytes, std::int64_t i) {
  const std::int64_t left = bytes - i * kStageBytes;
  return {from + i * kStageBytes,
          static_cast<std::uint32_t>(left < kStageBytes ? left : std::int64_t{kStageBytes})};
}

}  // namespace deep_ep::cuda
