#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>

#include "plays.hpp"
#include "seeds.hpp"

// Ranks that are threads of this process pose as several nodes: the protocol between nodes as it
// is, over memory of the process.
namespace deep_ep::sim {
namespace {

// Room for all results from the start, as in buffer_test.cpp.
constexpr std::int64_t kHeapBytes = 6 << 20;

Buffers make_buffers(const Program& program, std::uint64_t seed, int num_threads) {
  if (seed % 3 == 0) setenv("DEEP_EP_INBOX_BYTES", "128", 1);  // less than a record for each ring
  setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(program.ranks_per_node).c_str(), 1);
  const auto bootstraps = bootstrap_threads(program.num_ranks);
  Buffers buffers(program.num_ranks);
  on_threads(program.num_ranks, [&](int rank) {
    buffers[rank] = std::make_unique<Buffer>(
        bootstraps[rank], BufferOptions{.num_nvl_bytes = kHeapBytes, .num_threads = num_threads});
  });
  unsetenv("DEEP_EP_INBOX_BYTES");
  unsetenv("DEEP_EP_RANKS_PER_NODE");
  return buffers;
}

constexpr std::chrono::milliseconds kTimeout{40};  // 40,000 turns

TEST(Internode, RandomDispatchesAndCombinesEqualTheReferenceUnderAnyScheduling) {
  for_each_seed(60, [](std::uint64_t seed) {
    const Program program(seed, true);
    const Buffers buffers = make_buffers(program, seed, 1);
    count_time_in_turns(buffers, kTimeout);
    play_in_turns(program, buffers, seed);
  });
}

// Several threads and lanes a rank.
TEST(Internode, RandomDispatchesAndCombinesEqualTheReferenceOnFreeThreads) {
  for_each_seed(25, [](std::uint64_t seed) {
    const Program program(seed, true);
    play_freely(program, make_buffers(program, seed, 2));
  });
}

TEST(Internode, WhenARankStopsAllOthersFailAndSomeoneNamesIt) {
  std::uint64_t stopped_runs = 0;
  const std::uint64_t seeds = for_each_seed(40, [&](std::uint64_t seed) {
    const Program program(seed, true);
    const Buffers buffers = make_buffers(program, seed, 1);
    count_time_in_turns(buffers, kTimeout);
    play_until_stopped(program, buffers, seed, static_cast<int>(seed % program.num_ranks), 400);
    ++stopped_runs;
  });
  if (std::getenv("DEEP_EP_SIM_SEED") == nullptr) {
    EXPECT_GT(stopped_runs, seeds * 3 / 4);
  }
}

}  // namespace
}  // namespace deep_ep::sim
