// Ranks as threads of one process, so that race and leak detectors see all of them.
#include <gtest/gtest.h>

#include <functional>
#include <thread>
#include <vector>

#include "deep_ep/error.hpp"
#include "heap_exchange.hpp"

namespace deep_ep::fabric {
namespace {

void in_threads(int size, const std::function<void(Bootstrap&)>& body) {
  const auto bootstraps = bootstrap_threads(size);
  std::vector<std::thread> ranks;
  for (const auto& bootstrap : bootstraps) ranks.emplace_back([&] { body(*bootstrap); });
  for (auto& rank : ranks) rank.join();
}

TEST(SymmetricHeapThreads, RanksOfOneProcessExchange) { in_threads(3, exchange); }

TEST(SymmetricHeapThreads, RanksThatLeaveWhileBytesAreUnderWayLeakNothing) {
  in_threads(2, [](Bootstrap& bootstrap) {
    constexpr std::int64_t kBytes = 8 << 20;
    const std::vector<char> source(kBytes, 'x');
    auto heap = make_heap(bootstrap, kBytes);
    bootstrap.barrier();
    if (bootstrap.rank() == 0) {
      heap.reset();
      bootstrap.barrier();
      return;
    }
    try {
      for (int i = 0; i < 8; ++i) heap->put(0, 0, source.data(), kBytes);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kPeerFailed) << error.what();
    }
    EXPECT_TRUE(await_loss(*heap, 0, milliseconds(5000)));
    bootstrap.barrier();
    heap.reset();
  });
}

}  // namespace
}  // namespace deep_ep::fabric
