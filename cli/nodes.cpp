#include "nodes.hpp"

#include <cstdlib>
#include <string>

#include "base/env.hpp"
#include "base/error.hpp"
#include "fabric/mesh.hpp"
#include "ranks.hpp"

namespace deep_ep::cli {
namespace {

constexpr int kPresetNodes = 2;
constexpr int kPresetRanksPerNode = 2;

void pose(int ranks_per_node) {
  setenv("DEEP_EP_RANKS_PER_NODE",  // NOLINT(concurrency-mt-unsafe): no other thread runs yet
         std::to_string(ranks_per_node).c_str(), 1);
}

}  // namespace

void add_node_options(CLI::App& command, NodesAsked& asked, bool may_be_one) {
  command
      .add_option("--nodes", asked.nodes,
                  "Nodes, which ranks of this machine pose as, unless a launcher started them")
      ->default_str(may_be_one ? "1" : std::to_string(kPresetNodes));
  command
      .add_option("--ranks-per-node", asked.ranks_per_node,
                  "Ranks of each, one process each; with a launcher those of one machine, but if "
                  "this or DEEP_EP_RANKS_PER_NODE is given")
      ->default_str(std::to_string(kPresetRanksPerNode));
}

int count_node_ranks(const NodesAsked& asked) {
  require(asked.nodes == 0 || asked.nodes >= 2, "--nodes is {}, must be at least 2", asked.nodes);
  require(asked.ranks_per_node >= 0, "--ranks-per-node is {}, must be at least 1",
          asked.ranks_per_node);
  const int set = env::ranks_per_node();
  require(set == 0 || asked.ranks_per_node == 0 || set == asked.ranks_per_node,
          "--ranks-per-node is {}, but DEEP_EP_RANKS_PER_NODE is {}", asked.ranks_per_node, set);
  const int given = asked.ranks_per_node > 0 ? asked.ranks_per_node : set;
  if (const auto launch = env::launch()) {
    require(asked.nodes == 0 || given == 0 || asked.nodes * given == launch->size,
            "{} nodes of {} ranks contradict the launcher, which started {} ranks", asked.nodes,
            given, launch->size);
    if (given > 0) pose(given);
    return launch->size;
  }
  const int ranks_per_node = given > 0 ? given : kPresetRanksPerNode;
  pose(ranks_per_node);
  return (asked.nodes > 0 ? asked.nodes : kPresetNodes) * ranks_per_node;
}

int count_ranks(int ranks, int preset, const NodesAsked& asked) {
  if (!asked.several()) return count_ranks(ranks, preset);
  const int count = count_node_ranks(asked);
  require(ranks == 0 || ranks == count, "--ranks {} contradicts {} ranks on several nodes", ranks,
          count);
  return count;
}

plan::Topology find_nodes(Bootstrap& bootstrap, const NodesAsked& asked) {
  const std::vector<std::string> hosts = bootstrap.all_gather(fabric::host_id());
  const plan::Topology topology = plan::find_topology(hosts, env::ranks_per_node());
  require(topology.num_nodes() > 1,
          "the {} ranks are of one node: start some on other machines, or let those of this one "
          "pose as nodes by --ranks-per-node or DEEP_EP_RANKS_PER_NODE",
          topology.num_ranks);
  require(asked.nodes == 0 || asked.nodes == topology.num_nodes(),
          "--nodes is {}, but the ranks are of {} nodes", asked.nodes, topology.num_nodes());
  pose(topology.ranks_per_node);
  return topology;
}

int find_ranks_per_node(Bootstrap& bootstrap, const NodesAsked& asked) {
  return asked.several() ? find_nodes(bootstrap, asked).ranks_per_node : 0;
}

}  // namespace deep_ep::cli
