#include "contract/network_plan.hpp"

#include <gtest/gtest.h>

namespace deep_ep::test {
namespace {

/// A Case or a LowLatencyCase.
template <class AnyCase>
AnyCase over_two_nodes_of_two(std::int64_t hidden) {
  AnyCase c;
  c.ranks = 4;
  c.ranks_per_node = 2;
  c.experts = 16;
  c.topk = 4;
  c.tokens = {3, 0, 5, 1};
  c.hidden = hidden;
  c.routing = verify::Routing::kAllToAll;
  return c;
}

Program two_nodes_of_two() {
  Program program;
  program.ranks = 4;
  program.ranks_per_node = 2;
  auto c = over_two_nodes_of_two<verify::Case>(64);
  c.cached_repeats = 2;
  c.combines = 1;
  program.steps.push_back({0, c});
  return program;
}

// Every token to all four ranks: once to the other node, whose record is 64 bytes of head, ranks
// and padding, and 128 of the row; its sum is 128.
TEST(NetworkPlan, ATokenCrossesOnceToANodeAndItsSumOnce) {
  EXPECT_EQ(bytes_between_nodes(two_nodes_of_two()), 9 * (3 * (64 + 128) + 128));
}

TEST(NetworkPlan, WhatStaysOnItsNodeIsNotCounted) {
  Program program = two_nodes_of_two();
  program.steps[0].exchange.routing = verify::Routing::kToSelf;
  EXPECT_EQ(bytes_between_nodes(program), 0);
  program = two_nodes_of_two();
  program.ranks_per_node = program.steps[0].exchange.ranks_per_node = 0;
  EXPECT_EQ(bytes_between_nodes(program), 0);
}

// To both ranks of the other node, in each of two dispatches, and home three times.
TEST(NetworkPlan, ALowLatencyTokenCrossesOnceToEachRank) {
  Program program = two_nodes_of_two();
  auto c = over_two_nodes_of_two<verify::LowLatencyCase>(128);
  c.payload = verify::LowLatencyPayload::kBfloat16;
  c.dispatches = 2;
  c.combines = 3;
  program.steps[0].low_latency = c;
  EXPECT_EQ(bytes_between_nodes(program), 9 * 2 * (2 * 256 + 3 * 256));
  program.steps[0].low_latency->payload = verify::LowLatencyPayload::kFp8;
  EXPECT_EQ(bytes_between_nodes(program), 9 * 2 * (2 * 128 + 3 * 256));
}

}  // namespace
}  // namespace deep_ep::test
