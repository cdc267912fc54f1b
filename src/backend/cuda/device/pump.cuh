#pragma once

#include "backend/cuda/device/ptx.cuh"

namespace deep_ep::cuda {

/// What is moved next: a multiple of 16 bytes, at most a stage.
struct Piece {
  const std::byte* from;  // null: next.fill(stage, piece) writes the bytes, by the whole warp
  std::uint32_t bytes;
};

/// A warp's pipeline through shared memory: pieces come in by bulk copies, each on its stage's
/// barrier, and go out by bulk copies, to one or several places. At most kOut pieces are on their
/// way out, and kStages - kOut + 1 on their way in: how many warps pump at a time says how much a
/// link has to queue. A lane's Note of a piece is what it has to know in order to store it. With a
/// lag, completed() is called for a piece once so many more have been stored behind it.
///
/// A warp that pumps is alone on its scheduler most of the time: what it does for a piece is a
/// chain of latencies, so no division and no 64-bit arithmetic that could be kept out of it.
template <int kStageCount, int kBytes, int kOutCount, class LaneNote, int kCompletionLag = 0>
class Pump {
 public:
  static constexpr int kStages = kStageCount;
  static constexpr std::uint32_t kStageBytes = kBytes;
  static constexpr int kOut = kOutCount;
  static constexpr int kLag = kCompletionLag;
  static constexpr int kNotes = kStages + kCompletionLag + 1;
  using Note = LaneNote;
  static_assert(kOut >= 1 && kStages > kOut, "a piece is on its way in while others go out");
  struct Storage {
    alignas(128) std::byte stages[kStages][kStageBytes];
    std::uint64_t barriers[kStages];
    alignas(16) Note notes[kNotes][32];  // a lane's are read by itself only
  };

  /// By the whole warp.
  __device__ explicit Pump(Storage& storage) : storage_(storage) {
    if (lane() == 0) {
      for (std::uint64_t& barrier : storage_.barriers) mbarrier_init(&barrier, 1);
      fence_mbarrier_init_release_cluster();
    }
    __syncwarp();
  }

  /// Puts the first pieces on their way, which needs nothing of the places they go to. next(piece,
  /// note) gives a piece and the lane's Note, or false if there is none; it is called by every
  /// lane.
  template <class Next>
  __device__ void start(Next&& next) {
    Piece piece;
#pragma unroll 1
    while (here_ < kStages - kOut + 1 && take(next, piece)) load(next, piece);
  }

  struct Nothing {
    __device__ void operator()(const Note&) const {}
  };

  /// Moves all pieces that next() still gives, and those under way. place(note, there) says where a
  /// piece goes, while another one is under way; unless `there`, what it says does not matter.
  /// store(from, place) issues the bulk stores that the lane looks after; completed(note) may tell
  /// that what they wrote is there.
  template <class Next, class Placed, class Store, class Completed = Nothing>
  __device__ void run(Next&& next, Placed&& place, Store&& store, Completed&& completed = {}) {
    start(next);
    auto to = place(storage_.notes[out_note_][lane()], here_ != 0);
#pragma unroll 1
    while (here_ != 0) {
      wait_loaded();
      store(storage_.stages[out_stage_], to);
      bulk_commit_group();
      pass();
      // All that can be found while the stores are under way.
      Piece piece;
      const bool more = take(next, piece);
      to = place(storage_.notes[out_note_][lane()], here_ != 0);
      // The stage that is filled next was read by the stores before these.
      bulk_wait_group_read<kOut - 1>();
      __syncwarp();
      if (more) load(next, piece);
      if constexpr (kLag > 0) {
        bulk_wait_group<kLag>();
        if (++stored_ > kLag) complete(completed);
      }
    }
    bulk_wait_group<0>();
    __syncwarp();
    if constexpr (kLag > 0) {
      while (stored_ > 0) complete(completed);
    }
  }

  /// The same for a next() that may have nothing for a while: until it has nothing and nothing is
  /// under way. next() stands in one place, since it is long.
  template <class Next, class Store, class Completed = Nothing>
  __device__ void run_while(Next& next, Store&& store, Completed&& completed = {}) {
#pragma unroll 1
    while (true) {
      Piece piece;
#pragma unroll 1
      while (here_ < kStages - kOut + 1 && take(next, piece)) {
        // The stage that is filled next was read by the stores before the last ones.
        bulk_wait_group_read<kOut - 1>();
        __syncwarp();
        load(next, piece);
      }
      if (here_ == 0) break;
      wait_loaded();
      store(storage_.stages[out_stage_], storage_.notes[out_note_][lane()]);
      bulk_commit_group();
      pass();
      if constexpr (kLag > 0) {
        bulk_wait_group<kLag>();
        __syncwarp();
        if (++stored_ > kLag) complete(completed);
      }
    }
    bulk_wait_group<0>();
    __syncwarp();
    if constexpr (kLag > 0) {
#pragma unroll 1
      while (stored_ > 0) complete(completed);
    }
  }

  /// Gives up what start() has put on its way: shared memory must not be left to it.
  __device__ void drop() {
    for (; here_ != 0; pass()) wait_loaded();
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  template <int kSize>
  __device__ static void advance(int& i) {
    i = i + 1 == kSize ? 0 : i + 1;
  }

  /// The piece that is stored next is here.
  __device__ void wait_loaded() {
    while (!mbarrier_try_wait_parity_acquire_cta(&storage_.barriers[out_stage_], parity_)) {
    }
  }
  __device__ void pass() {
    --here_;
    advance<kNotes>(out_note_);
    advance<kStages>(out_stage_);
    if (out_stage_ == 0) parity_ ^= 1;
  }

  template <class Next>
  __device__ bool take(Next& next, Piece& piece) {
    Note note;
    if (!next(piece, note)) return false;
    storage_.notes[in_note_][lane()] = note;
    advance<kNotes>(in_note_);
    return true;
  }

  template <class Next>
  __device__ void load(Next& next, const Piece& piece) {
    std::byte* stage = storage_.stages[in_stage_];
    bool copied = true;
    if constexpr (requires { next.fill(stage, piece); }) {
      copied = piece.from != nullptr;
      if (!copied) {
        next.fill(stage, piece);
        fence_proxy_async_shared();
        __syncwarp();
      }
    }
    if (lane() == 0) {
      std::uint64_t* barrier = &storage_.barriers[in_stage_];
      mbarrier_arrive_expect_tx(barrier, copied ? piece.bytes : 0);
      if (copied) bulk_load(stage, piece.from, piece.bytes, barrier);
    }
    advance<kStages>(in_stage_);
    ++here_;
  }

  template <class Completed>
  __device__ void complete(Completed& completed) {
    completed(storage_.notes[told_note_][lane()]);
    advance<kNotes>(told_note_);
    --stored_;
  }

  Storage& storage_;
  int here_ = 0;  // pieces loaded and not stored
  int in_stage_ = 0;
  int in_note_ = 0;
  int out_stage_ = 0;
  int out_note_ = 0;
  std::uint32_t parity_ = 0;  // of the stage that is stored next
  int stored_ = 0;            // and not told
  int told_note_ = 0;
};

}  // namespace deep_ep::cuda
