#include "deep_ep/buffer.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "baton_scheduler.hpp"
#include "deep_ep/error.hpp"
#include "plays.hpp"
#include "seeds.hpp"

// The host backend as it is, its ranks threads of this process: one thread a rank, so that a run
// depends on the seed alone.
namespace deep_ep::sim {
namespace {

// Room for all results from the start: memory that is mapped during a call is mapped by a thread
// that no scheduler orders.
constexpr std::int64_t kHeapBytes = 4 << 20;

/// The three ways of combine take turns: through the inbox, read from memory that all map, read
/// from the peer's own memory. (An inbox of the default size is larger than that heap.)
void choose_path(std::uint64_t seed) {
  const std::uint64_t path = seed % 3;
  setenv("DEEP_EP_COMBINE", path == 0 ? "ring" : "pull", 1);
  setenv("DEEP_EP_INBOX_BYTES", path == 2 ? "128" : "65536", 1);
}

Buffers make_buffers(std::uint64_t seed, int num_ranks, int num_threads = 1) {
  choose_path(seed);
  const auto bootstraps = bootstrap_threads(num_ranks);
  Buffers buffers(num_ranks);
  on_threads(num_ranks, [&](int rank) {
    buffers[rank] = std::make_unique<Buffer>(
        bootstraps[rank], BufferOptions{.num_nvl_bytes = kHeapBytes, .num_threads = num_threads});
  });
  unsetenv("DEEP_EP_COMBINE");
  unsetenv("DEEP_EP_INBOX_BYTES");
  return buffers;
}

constexpr std::chrono::milliseconds kTimeout{20};  // 20,000 turns

TEST(Buffer, RandomDispatchesAndCombinesEqualTheReferenceUnderAnyScheduling) {
  for_each_seed(100, [](std::uint64_t seed) {
    const Program program(seed);
    const Buffers buffers = make_buffers(seed, program.num_ranks);
    count_time_in_turns(buffers, kTimeout);
    play_in_turns(program, buffers, seed);
  });
}

// Several threads a rank.
TEST(Buffer, RandomDispatchesAndCombinesEqualTheReferenceOnFreeThreads) {
  for_each_seed(40, [](std::uint64_t seed) {
    const Program program(seed);
    play_freely(program, make_buffers(seed, program.num_ranks, 2));
  });
}

// A rank may run out of time waiting for one that itself waits for the stopped one, so not every
// Error blames the right rank; but the one that was waited for directly is in the chain.
TEST(Buffer, WhenARankStopsAllOthersFailAndSomeoneNamesIt) {
  std::uint64_t stopped_runs = 0;
  const std::uint64_t seeds = for_each_seed(60, [&](std::uint64_t seed) {
    const Program program(seed);
    if (program.num_ranks == 1) return;
    const Buffers buffers = make_buffers(seed, program.num_ranks);
    count_time_in_turns(buffers, kTimeout);
    play_until_stopped(program, buffers, seed, static_cast<int>(seed % program.num_ranks), 250);
    ++stopped_runs;
  });
  if (std::getenv("DEEP_EP_SIM_SEED") == nullptr) {
    EXPECT_GT(stopped_runs, seeds / 2);
  }
}

// Ranks give up at almost the same time, each at any point of another's giving up: who waits for a
// rank that waits for the stopped one must still find the way to that one.
TEST(Buffer, EveryRankBlamesTheOneThatStoppedInABarrier) {
  for_each_seed(150, [](std::uint64_t seed) {
    constexpr int kRanks = 4;
    constexpr int kStopped = 2;
    const auto buffers = make_buffers(seed, kRanks);
    for (const auto& buffer : buffers) buffer->set_timeout(std::chrono::milliseconds(8));  // 8000
    std::vector<std::function<void()>> ranks;
    for (int rank = 0; rank < kRanks; ++rank) {
      ranks.push_back([&, rank] {
        try {
          for (;;) buffers[rank]->barrier();
        } catch (const Error& error) {
          EXPECT_EQ(error.ranks(), std::vector{kStopped})
              << "rank " << rank << ": " << error.what();
        }
      });
    }
    BatonScheduler scheduler(seed, {.delay_per_mille = 300,
                                    .stop_rank = kStopped,
                                    .stop_at_point = 1 + static_cast<int>(seed % 12)});
    scheduler.run(ranks);
    EXPECT_TRUE(scheduler.stopped(kStopped));
  });
}

}  // namespace
}  // namespace deep_ep::sim
