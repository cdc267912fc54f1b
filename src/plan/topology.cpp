#include "plan/topology.hpp"

#include <algorithm>
#include <sstream>

#include "base/error.hpp"

namespace deep_ep::plan {

namespace {

struct Gpu {
  std::string name{};
  std::vector<std::string> out_of_reach{};

  explicit Gpu(const std::string& text) {
    std::istringstream words(text);
    words >> name;
    for (std::string one; words >> one;) out_of_reach.push_back(one);
  }
  bool maps(const Gpu& other) const {
    return std::find(out_of_reach.begin(), out_of_reach.end(), other.name) == out_of_reach.end();
  }
};

/// Ranks behind `first` on the same host.
int count_neighbours(const std::vector<std::string>& hosts, int first) {
  int count = 1;
  while (first + count < static_cast<int>(hosts.size()) && hosts[first + count] == hosts[first])
    ++count;
  return count;
}

void check_size(const Topology& topology) {
  if (topology.num_nodes() == 1) return;
  if (topology.ranks_per_node > kMaxRanksPerNode || topology.num_nodes() > kMaxNodes) {
    throw Error(
        ErrorCode::kUnsupported,
        fmt::format("{} nodes of {} ranks: at most {} nodes of {} ranks can exchange",
                    topology.num_nodes(), topology.ranks_per_node, kMaxNodes, kMaxRanksPerNode));
  }
}

Topology chosen_topology(const std::vector<std::string>& hosts, int ranks_per_node) {
  const int num_ranks = static_cast<int>(hosts.size());
  require(num_ranks % ranks_per_node == 0,
          "DEEP_EP_RANKS_PER_NODE is {}, must divide the number of ranks, {}", ranks_per_node,
          num_ranks);
  const Topology topology{num_ranks, ranks_per_node};
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int first = topology.rank_of(topology.node_of(rank), 0);
    require(hosts[rank] == hosts[first],
            "DEEP_EP_RANKS_PER_NODE is {}, but ranks {} and {}, which would be of one node, cannot "
            "map each other's memory: they are on different hosts, or on GPUs without peer access",
            ranks_per_node, first, rank);
  }
  return topology;
}

Topology found_topology(const std::vector<std::string>& hosts) {
  const int num_ranks = static_cast<int>(hosts.size());
  const int ranks_per_node = count_neighbours(hosts, 0);
  for (int first = 0; first < num_ranks; first += ranks_per_node) {
    const int count = count_neighbours(hosts, first);
    // A host that comes again later would be two nodes without a reason.
    bool again = false;
    for (int before = 0; before < first; ++before) again = again || hosts[before] == hosts[first];
    if (count == ranks_per_node && !again) continue;
    throw Error(
        ErrorCode::kUnsupported,
        fmt::format("ranks {} to {} are on one host{}, while ranks 0 to {} are on another: each "
                    "host must have the same number of ranks, one behind the other (or set "
                    "DEEP_EP_RANKS_PER_NODE)",
                    first, first + count - 1, again ? " with ranks before them" : "",
                    ranks_per_node - 1));
  }
  return {num_ranks, ranks_per_node};
}

}  // namespace

std::vector<std::string> split_hosts(const std::vector<std::string>& hosts,
                                     const std::vector<std::string>& gpus) {
  std::vector<std::string> split;
  std::vector<Gpu> group;
  std::string name;
  for (std::size_t rank = 0; rank < hosts.size(); ++rank) {
    const Gpu own(gpus[rank]);
    const bool together = rank > 0 && hosts[rank] == hosts[rank - 1] &&
                          std::all_of(group.begin(), group.end(), [&](const Gpu& other) {
                            return own.maps(other) && other.maps(own);
                          });
    if (!together) {
      group.clear();
      // A host that comes again later stays one, which find_topology() refuses.
      const bool part = rank > 0 && hosts[rank] == hosts[rank - 1];
      name = part ? fmt::format("{}, from rank {}", hosts[rank], rank) : hosts[rank];
    }
    group.push_back(own);
    split.push_back(name);
  }
  return split;
}

Topology find_topology(const std::vector<std::string>& hosts, int ranks_per_node) {
  const int num_ranks = static_cast<int>(hosts.size());
  require(num_ranks >= 1, "there are {} ranks, at least 1 is needed", num_ranks);
  // So many that all ranks are of one node says the same as not to be set, on one host.
  const bool given = ranks_per_node > 0 && ranks_per_node < num_ranks;
  const Topology topology = given ? chosen_topology(hosts, ranks_per_node) : found_topology(hosts);
  if (ranks_per_node >= num_ranks) {
    require(topology.num_nodes() == 1,
            "DEEP_EP_RANKS_PER_NODE is {}, but the {} ranks are on {} hosts, and ranks of one node "
            "must map each other's memory",
            ranks_per_node, num_ranks, topology.num_nodes());
  }
  check_size(topology);
  return topology;
}

}  // namespace deep_ep::plan
