#pragma once

#include <string>
#include <vector>

#include "base/portable.hpp"

namespace deep_ep::plan {

/// Which ranks are of one node, that is, map each other's memory: ranks_per_node neighbours each.
/// Ranks with the same index on different nodes are rail peers: what crosses the network goes from
/// one to the other.
struct Topology {
  int num_ranks = 1;
  int ranks_per_node = 1;

  DEEP_EP_HD constexpr int num_nodes() const { return num_ranks / ranks_per_node; }
  DEEP_EP_HD constexpr int node_of(int rank) const { return rank / ranks_per_node; }
  DEEP_EP_HD constexpr int index_of(int rank) const { return rank % ranks_per_node; }
  DEEP_EP_HD constexpr int rank_of(int node, int index) const {
    return node * ranks_per_node + index;
  }

  friend bool operator==(const Topology&, const Topology&) = default;
};

/// The largest topology that messages between nodes can name.
constexpr int kMaxRanksPerNode = 64;
constexpr int kMaxNodes = 64;

/// Of ranks on GPUs, which are of one node only if they can map each other's memory: their hosts as
/// find_topology() takes them. Neighbours of one host stay together as long as each can map the
/// memory of all others of its group. `gpus` has of each rank its GPU and, behind spaces, those of
/// its host whose memory it cannot map; an empty text stands for one that can map all.
std::vector<std::string> split_hosts(const std::vector<std::string>& hosts,
                                     const std::vector<std::string>& gpus);

/// From each rank's host (equal texts: they can map each other's memory) and DEEP_EP_RANKS_PER_NODE
/// (0: not set), which makes ranks of one host pose as several nodes. Throws
/// Error(kInvalidArgument) naming the variable and its value if the ranks cannot be divided so or
/// would make one node of several hosts, Error(kUnsupported) if hosts hold different numbers of
/// ranks, or not neighbours.
Topology find_topology(const std::vector<std::string>& hosts, int ranks_per_node);

}  // namespace deep_ep::plan
