#include "fabric/local_heap.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <thread>

#include "deep_ep/error.hpp"
#include "protocol/atomic.hpp"

namespace deep_ep::fabric {
namespace {

constexpr std::int64_t kBytes = 1 << 16;

/// Runs `body` on `count` threads with a heap each, all of which live until all are done.
void on_heaps(int count, const std::function<void(int, LocalHeap&, std::atomic<int>&)>& body) {
  const auto bootstraps = bootstrap_threads(count);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < count; ++rank) {
    threads.emplace_back([&, rank] {
      std::atomic<int> rung = 0;
      {
        LocalHeap heap(*bootstraps[rank], {.bytes = kBytes, .on_signal = [&rung] { ++rung; }});
        body(rank, heap, rung);
        bootstraps[rank]->barrier();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

std::uint64_t* word(const LocalHeap& heap, std::int64_t offset) {
  return reinterpret_cast<std::uint64_t*>(heap.base() + offset);
}

TEST(LocalHeap, ASignalReleasesThePutsBeforeIt) {
  on_heaps(3, [](int rank, LocalHeap& heap, std::atomic<int>& rung) {
    const int to = (rank + 1) % 3;
    std::vector<std::byte> data(5000, static_cast<std::byte>(rank + 1));
    heap.put(to, 256, data.data(), 5000);
    heap.signal(to, 0, 42);
    EXPECT_TRUE(heap.flush(to, std::chrono::milliseconds(0)));
    while (protocol::load_acquire(word(heap, 0)) != 42) std::this_thread::yield();
    const auto from = static_cast<std::byte>((rank + 2) % 3 + 1);
    EXPECT_EQ(heap.base()[256], from);
    EXPECT_EQ(heap.base()[256 + 4999], from);
    EXPECT_EQ(heap.base()[256 + 5000], std::byte{0});
    while (rung == 0) std::this_thread::yield();
    const TransportCounts counts = heap.counts();
    EXPECT_EQ(counts.puts, 1);
    EXPECT_EQ(counts.put_bytes, 5000);
    EXPECT_EQ(counts.signals, 1);
  });
}

TEST(LocalHeap, RangesOutsideAreRefused) {
  on_heaps(1, [](int, LocalHeap& heap, std::atomic<int>&) {
    const std::uint64_t value = 1;
    EXPECT_THROW(heap.put(0, kBytes - 4, &value, 8), Error);
    EXPECT_THROW(heap.put(0, -1, &value, 8), Error);
    EXPECT_THROW(heap.put(1, 0, &value, 8), Error);
    EXPECT_THROW(heap.signal(0, 4, 1), Error);
  });
}

TEST(LocalHeap, WhoLeavesIsLostAndNamed) {
  const auto bootstraps = bootstrap_threads(2);
  std::thread other([&] { const LocalHeap heap(*bootstraps[1], {.bytes = kBytes}); });
  LocalHeap heap(*bootstraps[0], {.bytes = kBytes});
  other.join();
  EXPECT_TRUE(heap.lost(1));
  EXPECT_FALSE(heap.lost(0));
  try {
    heap.signal(1, 0, 1);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kPeerFailed);
    EXPECT_EQ(error.ranks(), std::vector{1});
  }
}

}  // namespace
}  // namespace deep_ep::fabric
