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

// Ranks that are threads of this process pose as several nodes: the protocol between nodes as it
// is, over memory of the process.
namespace deep_ep::sim {
namespace {

// Room for all results from the start, as in buffer_test.cpp.
constexpr std::int64_t kHeapBytes = 6 << 20;

void on_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

using Buffers = std::vector<std::unique_ptr<Buffer>>;

Buffers make_buffers(const Program& program, int num_threads) {
  setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(program.ranks_per_node).c_str(), 1);
  const auto bootstraps = bootstrap_threads(program.num_ranks);
  Buffers buffers(program.num_ranks);
  on_threads(program.num_ranks, [&](int rank) {
    buffers[rank] = std::make_unique<Buffer>(
        bootstraps[rank], BufferOptions{.num_nvl_bytes = kHeapBytes, .num_threads = num_threads});
  });
  unsetenv("DEEP_EP_RANKS_PER_NODE");
  return buffers;
}

void count_time_in_turns(const Buffers& buffers) {
  for (const auto& buffer : buffers) buffer->set_timeout(std::chrono::milliseconds(40));  // 40,000
}

/// A rank that destroys its Buffer is lost to the others, so all have ended before one does.
TEST(Internode, RandomDispatchesAndCombinesEqualTheReferenceUnderAnyScheduling) {
  for_each_seed(60, [](std::uint64_t seed) {
    const Program program(seed, true);
    const Buffers buffers = make_buffers(program, 1);
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

// No scheduler, several threads and lanes a rank: what a race detector looks at.
TEST(Internode, RandomDispatchesAndCombinesEqualTheReferenceOnFreeThreads) {
  for_each_seed(25, [](std::uint64_t seed) {
    const Program program(seed, true);
    const Buffers buffers = make_buffers(program, 2);
    std::vector<std::int64_t> wrong(program.num_ranks, -1);
    on_threads(program.num_ranks, [&](int rank) { wrong[rank] = program.play(*buffers[rank]); });
    EXPECT_EQ(wrong, std::vector<std::int64_t>(program.num_ranks));
  });
}

TEST(Internode, WhenARankStopsAllOthersFailAndSomeoneNamesIt) {
  int stopped_runs = 0;
  for_each_seed(40, [&](std::uint64_t seed) {
    const Program program(seed, true);
    const int stopped = static_cast<int>(seed % program.num_ranks);
    const Buffers buffers = make_buffers(program, 1);
    count_time_in_turns(buffers);
    std::vector<std::string> errors(program.num_ranks);
    std::vector<std::function<void()>> ranks;
    for (int rank = 0; rank < program.num_ranks; ++rank) {
      ranks.push_back([&, rank] {
        try {
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
        seed, {.stop_rank = stopped, .stop_at_point = 1 + static_cast<int>(seed * 31 % 400)});
    scheduler.run(ranks);
    EXPECT_TRUE(scheduler.stopped(stopped));
    const std::string name = "rank " + std::to_string(stopped) + " expected";
    int naming = 0;
    for (int rank = 0; rank < program.num_ranks; ++rank) {
      EXPECT_EQ(errors[rank].empty(), rank == stopped) << "rank " << rank;
      naming += errors[rank].find(name) != std::string::npos;
    }
    EXPECT_GT(naming, 0) << "stopped " << stopped << "; all: " << testing::PrintToString(errors);
    ++stopped_runs;
  });
  if (std::getenv("DEEP_EP_SIM_SEED") == nullptr) {
    EXPECT_GT(stopped_runs, 30);
  }
}

}  // namespace
}  // namespace deep_ep::sim
