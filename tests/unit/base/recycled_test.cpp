#include "base/recycled.hpp"

#include <gtest/gtest.h>

#include <array>
#include <thread>

namespace deep_ep {
namespace {

struct Large {
  explicit Large(int value) : first(value) {}
  int first;
  std::array<std::byte, 8192> rest;
};

TEST(Recycled, TheNextObjectOfAThreadGetsTheMemoryOfTheLast) {
  auto object = make_recycled<Large>(1);
  const Large* place = object.get();
  object.reset();
  const auto other = std::make_shared<Large>(9);  // would get that place if it were free
  const auto next = make_recycled<Large>(2);
  EXPECT_EQ(next.get(), place);
  EXPECT_EQ(next->first, 2);
}

TEST(Recycled, ObjectsThatLiveAtOnceHaveMemoryOfTheirOwn) {
  auto first = make_recycled<Large>(1);
  auto second = make_recycled<Large>(2);
  EXPECT_NE(first.get(), second.get());
  EXPECT_EQ(first->first, 1);
  first.reset();
  second.reset();  // more than is kept
  const auto third = make_recycled<Large>(3);
  const auto fourth = make_recycled<Large>(4);
  EXPECT_NE(third.get(), fourth.get());
  EXPECT_EQ(third->first, 3);
}

TEST(Recycled, AnObjectMayEndOnAnotherThreadAndOutliveItsOwn) {
  std::shared_ptr<Large> left;
  std::thread([&] { left = make_recycled<Large>(5); }).join();
  EXPECT_EQ(left->first, 5);
  const auto kept = make_recycled<Large>(7);  // what this thread has of earlier tests
  const Large* place = left.get();
  left.reset();
  const auto other = std::make_shared<Large>(9);
  EXPECT_EQ(make_recycled<Large>(6).get(), place);
}

}  // namespace
}  // namespace deep_ep
