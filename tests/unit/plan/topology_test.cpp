#include "plan/topology.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "refusal.hpp"

namespace deep_ep::plan {
namespace {

using Hosts = std::vector<std::string>;

TEST(Topology, RanksOfOneHostAreOneNode) {
  EXPECT_EQ(find_topology(Hosts(1, "a"), 0), (Topology{1, 1}));
  EXPECT_EQ(find_topology(Hosts(6, "a"), 0), (Topology{6, 6}));
  EXPECT_EQ(find_topology(Hosts(6, "a"), 6).num_nodes(), 1);
  EXPECT_EQ(find_topology(Hosts(6, "a"), 8).num_nodes(), 1);
}

TEST(Topology, HostsAreNodes) {
  EXPECT_EQ(find_topology({"a", "a", "b", "b", "c", "c"}, 0), (Topology{6, 2}));
  EXPECT_EQ(find_topology({"a", "b"}, 0), (Topology{2, 1}));
}

TEST(Topology, RanksOfOneHostPoseAsNodes) {
  EXPECT_EQ(find_topology(Hosts(8, "a"), 2), (Topology{8, 2}));
  EXPECT_EQ(find_topology({"a", "a", "a", "a", "b", "b", "b", "b"}, 2), (Topology{8, 2}));
}

TEST(Topology, NodesAndIndicesNameRanks) {
  const Topology topology{8, 4};
  for (int rank = 0; rank < 8; ++rank)
    EXPECT_EQ(topology.rank_of(topology.node_of(rank), topology.index_of(rank)), rank);
  EXPECT_EQ(topology.node_of(5), 1);
  EXPECT_EQ(topology.index_of(5), 1);
}

TEST(Topology, WhatCannotBeDividedIsRefusedByName) {
  EXPECT_THAT(
      refusal([] { find_topology(Hosts(6, "a"), 4); }, ErrorCode::kInvalidArgument),
      testing::HasSubstr("DEEP_EP_RANKS_PER_NODE is 4, must divide the number of ranks, 6"));
  EXPECT_THAT(refusal(
                  [] {
                    find_topology({"a", "b", "a", "b"}, 2);
                  },
                  ErrorCode::kInvalidArgument),
              testing::HasSubstr("DEEP_EP_RANKS_PER_NODE is 2, but ranks 0 and 1"));
  EXPECT_THAT(refusal(
                  [] {
                    find_topology({"a", "a", "b", "b"}, 8);
                  },
                  ErrorCode::kInvalidArgument),
              testing::HasSubstr("DEEP_EP_RANKS_PER_NODE is 8, but the 4 ranks are on 2 hosts"));
}

TEST(Topology, GpusThatMapEachOtherStayOneNode) {
  const Hosts hosts{"a", "a", "b", "b"};
  EXPECT_EQ(split_hosts(hosts, {"0", "1", "2", "3"}), hosts);
  EXPECT_EQ(split_hosts(hosts, {"", "", "", ""}), hosts) << "of hosts nothing is said";
  EXPECT_EQ(split_hosts(hosts, {"0 2", "1 3", "2", "3"}), hosts) << "not of their host";
  EXPECT_EQ(split_hosts(Hosts(4, "a"), {"0", "0", "1", "1"}), Hosts(4, "a"));
}

TEST(Topology, GpusWithoutPeerAccessAreNodes) {
  const auto nodes = [](const Hosts& hosts, const std::vector<std::string>& gpus) {
    return find_topology(split_hosts(hosts, gpus), 0);
  };
  EXPECT_EQ(nodes(Hosts(2, "a"), {"0 1", "1 0"}), (Topology{2, 1}));
  EXPECT_EQ(nodes(Hosts(2, "a"), {"0", "1 0"}), (Topology{2, 1})) << "one way is not enough";
  // Pairs with links of their own, on each of two hosts.
  EXPECT_EQ(nodes({"a", "a", "a", "a", "b", "b", "b", "b"},
                  {"0 2 3", "1 2 3", "2 0 1", "3 0 1", "4 6 7", "5 6 7", "6 4 5", "7 4 5"}),
            (Topology{8, 2}));
  // Rank 2 maps rank 1, but not rank 0, which is of its node.
  EXPECT_EQ(nodes(Hosts(4, "a"), {"0 2 3", "1", "2 0", "3 0"}), (Topology{4, 2}));
  EXPECT_THAT(refusal(
                  [] {
                    find_topology(split_hosts(Hosts(2, "a"), {"0 1", "1 0"}), 2);
                  },
                  ErrorCode::kInvalidArgument),
              testing::HasSubstr("DEEP_EP_RANKS_PER_NODE is 2"));
}

TEST(Topology, UnevenHostsAreNotSupported) {
  for (const Hosts& hosts : {Hosts{"a", "a", "b"}, Hosts{"a", "b", "b"}, Hosts{"a", "b", "a"}}) {
    try {
      find_topology(hosts, 0);
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported) << error.what();
    }
  }
  EXPECT_THROW(find_topology(Hosts(130, "a"), 65), Error);
  EXPECT_THROW(find_topology(Hosts(65, "a"), 1), Error);
}

}  // namespace
}  // namespace deep_ep::plan
