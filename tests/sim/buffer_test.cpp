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
#include "program.hpp"
#include "seeds.hpp"

// The host backend as it is, its ranks threads of this process: one thread a rank, so that a run
// depends on the seed alone.
namespace deep_ep::sim {
namespace {

// Room for all results from the start: memory that is mapped during a call is mapped by a thread
// that no scheduler orders.
constexpr std::int64_t kHeapBytes = 4 << 20;

void on_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

/// The three ways of combine take turns: through the inbox, read from memory that all map, read
/// from the peer's own memory. (An inbox of the default size is larger than that heap.)
void choose_path(std::uint64_t seed) {
  const std::uint64_t path = seed % 3;
  setenv("DEEP_EP_COMBINE", path == 0 ? "ring" : "pull", 1);
  setenv("DEEP_EP_INBOX_BYTES", path == 2 ? "128" : "65536", 1);
}

std::vector<std::unique_ptr<Buffer>> make_buffers(std::uint64_t seed, int num_ranks,
                                                  int num_threads = 1) {
  choose_path(seed);
  const auto bootstraps = bootstrap_threads(num_ranks);
  std::vector<std::unique_ptr<Buffer>> buffers(num_ranks);
  on_threads(num_ranks, [&](int rank) {
    buffers[rank] = std::make_unique<Buffer>(
        bootstraps[rank], BufferOptions{.num_nvl_bytes = kHeapBytes, .num_threads = num_threads});
  });
  return buffers;
}

void count_time_in_turns(const std::vector<std::unique_ptr<Buffer>>& buffers) {
  for (const auto& buffer : buffers) buffer->set_timeout(std::chrono::milliseconds(20));  // 20,000
}

TEST(Buffer, RandomDispatchesAndCombinesEqualTheReferenceUnderAnyScheduling) {
  for_each_seed(100, [](std::uint64_t seed) {
    const Program program(seed);
    const auto buffers = make_buffers(seed, program.num_ranks);
    count_time_in_turns(buffers);
    std::vector<std::int64_t> wrong(program.num_ranks, -1);
    std::vector<std::function<void()>> ranks;
    for (int rank = 0; rank < program.num_ranks; ++rank)
      ranks.push_back([&, rank] {
        try {
          wrong[rank] = program.play(*buffers[rank]);
        } catch (const Error& error) {
          ADD_FAILURE() << error.what();
        }
      });
    BatonScheduler scheduler(seed);
    scheduler.run(ranks);
    EXPECT_EQ(wrong, std::vector<std::int64_t>(program.num_ranks));
  });
}

// No scheduler, several threads a rank: what a race detector looks at.
TEST(Buffer, RandomDispatchesAndCombinesEqualTheReferenceOnFreeThreads) {
  for_each_seed(40, [](std::uint64_t seed) {
    const Program program(seed);
    const auto buffers = make_buffers(seed, program.num_ranks, 2);
    std::vector<std::int64_t> wrong(program.num_ranks, -1);
    on_threads(program.num_ranks, [&](int rank) { wrong[rank] = program.play(*buffers[rank]); });
    EXPECT_EQ(wrong, std::vector<std::int64_t>(program.num_ranks));
  });
}

// A rank may run out of time waiting for one that itself waits for the stopped one, so not every
// Error blames the right rank; but the one that was waited for directly is in the chain.
TEST(Buffer, WhenARankStopsAllOthersFailAndSomeoneNamesIt) {
  int stopped_runs = 0;
  for_each_seed(60, [&](std::uint64_t seed) {
    const Program program(seed);
    if (program.num_ranks == 1) return;
    const int stopped = static_cast<int>(seed % program.num_ranks);
    const auto buffers = make_buffers(seed, program.num_ranks);
    count_time_in_turns(buffers);
    std::vector<std::string> errors(program.num_ranks);
    std::vector<std::function<void()>> ranks;
    for (int rank = 0; rank < program.num_ranks; ++rank) {
      ranks.push_back([&, rank] {
        try {
          // Until the stopped rank is missed: it may stop behind its last part in a program.
          for (;;) EXPECT_EQ(program.play(*buffers[rank]), 0);
        } catch (const Error& error) {
          errors[rank] = error.what();
          EXPECT_TRUE(error.code() == ErrorCode::kTimeout) << error.what();
          EXPECT_FALSE(error.ranks().empty()) << error.what();
          EXPECT_THROW(buffers[rank]->barrier(), Error);
        }
      });
    }
    BatonScheduler scheduler(
        seed, {.stop_rank = stopped, .stop_at_point = 1 + static_cast<int>(seed * 31 % 250)});
    scheduler.run(ranks);
    EXPECT_TRUE(scheduler.stopped(stopped));
    const std::string name = "rank " + std::to_string(stopped) + " expected";
    int naming = 0;
    for (int rank = 0; rank < program.num_ranks; ++rank) {
      EXPECT_EQ(errors[rank].empty(), rank == stopped) << "rank " << rank;
      naming += errors[rank].find(name) != std::string::npos;
    }
    EXPECT_GT(naming, 0) << "stopped " << stopped << "; rank 0: " << errors[0];
    ++stopped_runs;
  });
  if (std::getenv("DEEP_EP_SIM_SEED") == nullptr) {
    EXPECT_GT(stopped_runs, 30);
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
