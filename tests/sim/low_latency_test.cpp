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

verify::LowLatencyCase random_case(std::mt19937_64& random, int ranks) {
  const auto below = [&random](int bound) {
    return static_cast<int>(random() % static_cast<std::uint64_t>(bound));
  };
  verify::LowLatencyCase c;
  c.seed = random();
  c.ranks = ranks;
  c.experts = ranks * (1 + below(3));
  c.topk = 1 + below(4);
  c.max_tokens = 1 + below(4);
  for (c.tokens.clear(); static_cast<int>(c.tokens.size()) < ranks;)
    c.tokens.push_back(below(static_cast<int>(c.max_tokens) + 1));
  c.payload = static_cast<verify::LowLatencyPayload>(below(9));
  c.hidden = 128;
  c.rank_major = below(2) == 1;
  c.hooks = static_cast<verify::Hooks>(below(6));
  c.routing = below(2) == 0 ? verify::Routing::kUniform : verify::Routing::kDuplicates;
  c.dispatches = 1 + below(4);
  c.combines = below(5);
  return c;
}

/// A few cases on one Buffer each rank.
struct Play {
  explicit Play(std::uint64_t seed, int num_threads) {
    std::mt19937_64 random(seed);
    const int ranks = 1 + static_cast<int>(random() % 4);
    BufferOptions options;
    options.num_threads = num_threads;
    for (int i = 0; i < 3; ++i) {
      cases.push_back(random_case(random, ranks));
      options.num_rdma_bytes = std::max(options.num_rdma_bytes, cases.back().buffer_bytes());
    }
    // Some begin just below a wrap of the tags.
    if (seed % 3 == 0) setenv("DEEP_EP_FIRST_TICKET", "2147483645", 1);
    setenv("DEEP_EP_INBOX_BYTES", "65536", 1);
    const auto bootstraps = bootstrap_threads(ranks);
    buffers.resize(ranks);
    on_ranks(
        [&](int rank) { buffers[rank] = std::make_unique<Buffer>(bootstraps[rank], options); });
    unsetenv("DEEP_EP_FIRST_TICKET");
    unsetenv("DEEP_EP_INBOX_BYTES");
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

TEST(LowLatency, RandomCallsEqualTheReferenceUnderAnyScheduling) {
  for_each_seed(400, [](std::uint64_t seed) {
    const Play play(seed, 1);
    for (const auto& buffer : play.buffers) buffer->set_timeout(std::chrono::milliseconds(50));
    std::vector<std::function<void()>> ranks;
    for (int rank = 0; rank < static_cast<int>(play.buffers.size()); ++rank)
      ranks.emplace_back([&play, rank] { play.run(rank); });
    BatonScheduler scheduler(seed);
    scheduler.run(ranks);
  });
}

// No scheduler, several threads a rank: what a race detector looks at.
TEST(LowLatency, RandomCallsEqualTheReferenceOnFreeThreads) {
  for_each_seed(150, [](std::uint64_t seed) {
    const Play play(seed, 2);
    play.on_ranks([&play](int rank) { play.run(rank); });
  });
}

}  // namespace
}  // namespace deep_ep::sim
