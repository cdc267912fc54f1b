#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "baton_scheduler.hpp"
#include "deep_ep/error.hpp"
#include "seeds.hpp"
#include "verify/low_latency_case.hpp"

// Low latency of the host backend under any order of its ranks, which are threads of this process.
namespace deep_ep::sim {
namespace {

/// Ranks, and ranks of a node; 0: all are of one.
struct Nodes {
  int ranks;
  int ranks_per_node;
};

Nodes random_nodes(std::mt19937_64& random, bool several) {
  if (!several) return {1 + static_cast<int>(random() % 4), 0};
  const int ranks_per_node = 1 + static_cast<int>(random() % 2);
  return {ranks_per_node * (2 + static_cast<int>(random() % 2)), ranks_per_node};
}

verify::LowLatencyCase random_case(std::mt19937_64& random, const Nodes& nodes) {
  const auto below = [&random](int bound) {
    return static_cast<int>(random() % static_cast<std::uint64_t>(bound));
  };
  verify::LowLatencyCase c;
  c.seed = random();
  c.ranks = nodes.ranks;
  c.ranks_per_node = nodes.ranks_per_node;
  c.experts = c.ranks * (1 + below(3));
  c.topk = 1 + below(4);
  c.max_tokens = 1 + below(4);
  for (c.tokens.clear(); static_cast<int>(c.tokens.size()) < c.ranks;)
    c.tokens.push_back(below(static_cast<int>(c.max_tokens) + 1));
  c.payload = static_cast<verify::LowLatencyPayload>(below(9));
  c.hidden = 128;
  c.rank_major = below(2) == 1;
  c.hooks = static_cast<verify::Hooks>(below(6));
  c.routing = below(2) == 0 ? verify::Routing::kUniform : verify::Routing::kDuplicates;
  c.dispatches = 1 + below(4);
  c.combines = below(5);
  c.wire = static_cast<plan::WireFormat>(below(3));
  return c;
}

/// A few cases on one Buffer each rank.
struct Play {
  Play(std::uint64_t seed, int num_threads, bool several_nodes) {
    std::mt19937_64 random(seed);
    const Nodes nodes = random_nodes(random, several_nodes);
    BufferOptions options;
    options.num_threads = num_threads;
    options.low_latency_mode = true;
    for (int i = 0; i < 3; ++i) {
      cases.push_back(random_case(random, nodes));
      options.num_rdma_bytes = std::max(options.num_rdma_bytes, cases.back().buffer_bytes());
    }
    // Some begin just below a wrap of the tags.
    if (seed % 3 == 0) setenv("DEEP_EP_FIRST_TICKET", "2147483645", 1);
    setenv("DEEP_EP_INBOX_BYTES", "65536", 1);
    if (several_nodes)
      setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(nodes.ranks_per_node).c_str(), 1);
    const auto bootstraps = bootstrap_threads(nodes.ranks);
    buffers.resize(nodes.ranks);
    on_ranks(
        [&](int rank) { buffers[rank] = std::make_unique<Buffer>(bootstraps[rank], options); });
    unsetenv("DEEP_EP_FIRST_TICKET");
    unsetenv("DEEP_EP_INBOX_BYTES");
    unsetenv("DEEP_EP_RANKS_PER_NODE");
  }

  void on_ranks(const std::function<void(int)>& body) const {
    std::vector<std::thread> threads;
    for (int i = 0; i < static_cast<int>(buffers.size()); ++i) threads.emplace_back(body, i);
    for (std::thread& thread : threads) thread.join();
  }

  void run(int rank) const {
    try {
      for (const verify::LowLatencyCase& c : cases) {
        const verify::CaseResult result = verify::run_case(*buffers[rank], c);
        EXPECT_TRUE(result.passed()) << "rank " << rank << ": " << result.first_mismatch << "\n"
                                     << c.describe();
      }
    } catch (const Error& error) {
      ADD_FAILURE() << "rank " << rank << ": " << error.what();
    }
  }

  std::vector<verify::LowLatencyCase> cases;
  std::vector<std::unique_ptr<Buffer>> buffers;
};

void play_in_turns(std::uint64_t seed, bool several_nodes) {
  const Play play(seed, 1, several_nodes);
  for (const auto& buffer : play.buffers) buffer->set_timeout(std::chrono::milliseconds(50));
  std::vector<std::function<void()>> ranks;
  for (int rank = 0; rank < static_cast<int>(play.buffers.size()); ++rank)
    ranks.emplace_back([&play, rank] { play.run(rank); });
  BatonScheduler scheduler(seed);
  scheduler.run(ranks);
}

void play_freely(std::uint64_t seed, bool several_nodes) {
  const Play play(seed, 2, several_nodes);
  play.on_ranks([&play](int rank) { play.run(rank); });
}

TEST(LowLatency, RandomCallsEqualTheReferenceUnderAnyScheduling) {
  for_each_seed(400, [](std::uint64_t seed) { play_in_turns(seed, false); });
}

TEST(LowLatency, BetweenNodesRandomCallsEqualTheReferenceUnderAnyScheduling) {
  for_each_seed(100, [](std::uint64_t seed) { play_in_turns(seed, true); });
}

// No scheduler, several threads a rank: what a race detector looks at.
TEST(LowLatency, RandomCallsEqualTheReferenceOnFreeThreads) {
  for_each_seed(150, [](std::uint64_t seed) { play_freely(seed, false); });
}

TEST(LowLatency, BetweenNodesRandomCallsEqualTheReferenceOnFreeThreads) {
  for_each_seed(50, [](std::uint64_t seed) { play_freely(seed, true); });
}

}  // namespace
}  // namespace deep_ep::sim
