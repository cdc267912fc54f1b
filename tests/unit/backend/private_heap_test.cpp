#include "backend/host/private_heap.hpp"

#include <gtest/gtest.h>

#include <cstring>

namespace deep_ep::host {
namespace {

constexpr std::int64_t kBytes = 3 << 20;

TEST(PrivateHeap, ABlockComesBackWithItsLastOwner) {
  const auto heap = std::make_shared<PrivateHeap>();
  auto first = heap->allocate(kBytes);
  std::byte* place = first.get();
  const auto second = heap->allocate(kBytes);
  EXPECT_GE(second.get() - place, kBytes);
  auto keeper = first;
  first.reset();
  EXPECT_NE(heap->allocate(kBytes).get(), place);
  keeper.reset();
  EXPECT_EQ(heap->allocate(kBytes).get(), place);
}

TEST(PrivateHeap, GrowsBeyondItsFirstSegmentAndOutlivesItsMaker) {
  auto heap = std::make_shared<PrivateHeap>();
  const auto small = heap->allocate(1);
  const auto large = heap->allocate(20 << 20);
  heap.reset();
  std::memset(large.get(), 1, 20 << 20);
  *small = std::byte{2};
  EXPECT_EQ(large.get()[(20 << 20) - 1], std::byte{1});
}

}  // namespace
}  // namespace deep_ep::host
