#include "fabric/heap.hpp"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <thread>
#include <vector>

#include "deep_ep/error.hpp"

namespace deep_ep::fabric {
namespace {

Heap::NewSegment refuse(std::int64_t bytes) {
  throw Error(ErrorCode::kOutOfMemory, "no more than " + std::to_string(bytes));
}

TEST(Heap, BlocksAreAlignedAndFirstFit) {
  Heap heap(refuse);
  heap.add(0, 100, 1024);
  const Block a = heap.allocate(1);
  const Block b = heap.allocate(129);
  EXPECT_EQ(a.offset, 128);
  EXPECT_EQ(a.bytes, 128);
  EXPECT_EQ(b.offset, 256);
  EXPECT_EQ(b.bytes, 256);
  heap.free(a);
  EXPECT_EQ(heap.allocate(0).offset, 128);
}

TEST(Heap, NeighboursMergeOnFree) {
  Heap heap(refuse);
  heap.add(0, 0, 512);
  const Block a = heap.allocate(128);
  const Block b = heap.allocate(128);
  const Block c = heap.allocate(256);
  EXPECT_THROW(heap.allocate(1), Error);
  heap.free(a);
  heap.free(c);
  heap.free(b);
  EXPECT_EQ(heap.allocate(512).offset, 0);
}

TEST(Heap, PartsOfDifferentSegmentsNeverMerge) {
  Heap heap(refuse);
  heap.add(0, 0, 256);
  heap.add(1, 256, 512);
  EXPECT_EQ(heap.free_bytes(), 512);
  EXPECT_THROW(heap.allocate(257), Error);
}

TEST(Heap, GrowsOnlyWhenNothingFits) {
  std::vector<std::int64_t> asked;
  Heap heap([&](std::int64_t bytes) {
    asked.push_back(bytes);
    return Heap::NewSegment{static_cast<int>(asked.size()), 4096};
  });
  heap.add(0, 0, 256);
  EXPECT_EQ(heap.allocate(256).segment, 0);
  EXPECT_TRUE(asked.empty());
  EXPECT_EQ(heap.allocate(200).segment, 1);
  EXPECT_EQ(heap.allocate(200).segment, 1);
  ASSERT_EQ(asked.size(), 1u);
  EXPECT_EQ(asked[0], 256);
}

TEST(Heap, ReserveMakesTheNextAllocationFit) {
  int growths = 0;
  Heap heap([&](std::int64_t bytes) {
    ++growths;
    return Heap::NewSegment{growths, bytes};
  });
  heap.reserve(1000);
  heap.reserve(1000);
  EXPECT_EQ(growths, 1);
  EXPECT_EQ(heap.live_bytes(), 0);
  heap.allocate(1000);
  EXPECT_EQ(growths, 1);
}

TEST(Heap, FailedGrowthLeavesItUnchanged) {
  Heap heap(refuse);
  heap.add(0, 0, 256);
  const Block block = heap.allocate(128);
  EXPECT_THROW(heap.allocate(1024), Error);
  EXPECT_THROW(heap.reserve(1024), Error);
  EXPECT_EQ(heap.live_bytes(), 128);
  EXPECT_EQ(heap.free_bytes(), 128);
  heap.free(block);
  EXPECT_EQ(heap.allocate(256).offset, 0);
}

TEST(Heap, RandomTrafficNeverOverlapsAndReturnsEverything) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  Heap heap(refuse);
  const std::int64_t total = 1 << 20;
  heap.add(3, 0, total);
  std::map<std::int64_t, Block> live;
  for (int i = 0; i < 20000; ++i) {
    if (random() % 2 == 0 || live.empty()) {
      try {
        const Block block = heap.allocate(1 + random() % 20000);
        const auto next = live.lower_bound(block.offset);
        ASSERT_TRUE(next == live.end() || block.offset + block.bytes <= next->first);
        if (next != live.begin()) {
          const Block& before = std::prev(next)->second;
          ASSERT_LE(before.offset + before.bytes, block.offset);
        }
        ASSERT_LE(block.offset + block.bytes, total);
        live[block.offset] = block;
      } catch (const Error&) {
      }
    } else {
      const auto victim = std::next(live.begin(), random() % live.size());
      heap.free(victim->second);
      live.erase(victim);
    }
    ASSERT_EQ(heap.live_bytes() + heap.free_bytes(), total);
  }
  for (const auto& [offset, block] : live) heap.free(block);
  EXPECT_EQ(heap.allocate(total).bytes, total);
}

TEST(Heap, ThreadsShareItWhileItGrows) {
  std::atomic<int> segments{0};
  Heap heap([&](std::int64_t bytes) { return Heap::NewSegment{segments++, bytes * 2}; });
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&heap, t] {
      for (int i = 0; i < 2000; ++i) heap.free(heap.allocate(128 * (1 + (i * 7 + t) % 31)));
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(heap.live_bytes(), 0);
}

}  // namespace
}  // namespace deep_ep::fabric
