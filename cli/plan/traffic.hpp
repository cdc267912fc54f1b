#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace deep_ep::cli {

/// Ranks n * ranks_per_node to (n + 1) * ranks_per_node - 1 are node n; each owns experts / ranks()
/// experts, in order.
struct Topology {
  int nodes = 1;
  int ranks_per_node = 8;

  int ranks() const { return nodes * ranks_per_node; }
};

/// Which distinct experts tokens choose.
struct Gate {
  std::int64_t tokens = 4096;  ///< of a rank
  int topk = 8;
  int experts = 256;
  /// Above 0, group-limited: a token draws so many nodes, then experts of these.
  int max_nodes = 0;
  /// How many times the mean the most popular rank is chosen.
  double skew = 1;
};

/// Rows that one rank sends or receives: the mean over ranks, and the most that any one sends or
/// receives.
struct Load {
  double mean = 0;
  double busiest = 0;
};

/// Where the rows of a dispatch go, per rank and call.
struct Route {
  double own = 0;  ///< stay on their rank; mean
  Load local;      ///< between ranks of a node
  Load network;    ///< between nodes
};

struct Traffic {
  double ranks_per_token = 0;  ///< distinct
  double nodes_per_token = 0;
  double entries_per_token = 0;  ///< entries of the top-k
  Load received;                 ///< rows, own ones included
  Route direct;                  ///< a row to each rank
  /// A row to each node, to the rank there that has the source's place, which passes it on.
  Route relayed;
  Route per_expert;  ///< a row to each expert, for comparison; the busiest as if entries were
                     ///< spread like rows
};

/// Probability that none of `draws` distinct draws from `all` is one of `some`.
double miss(std::int64_t all, std::int64_t some, std::int64_t draws);

/// Expected values in closed form. The busiest rank is the most popular one, and as far above its
/// mean as the largest of ranks() independent counts is expected to be. Throws
/// Error(kInvalidArgument).
Traffic expected_traffic(const Topology& topology, const Gate& gate);

/// Expert ids [tokens, topk] of a rank, -1 for none.
using IdsOf = std::function<std::vector<std::int64_t>(int rank)>;
/// The same, counted.
Traffic count_traffic(const Topology& topology, const Gate& gate, const IdsOf& ids_of);

}  // namespace deep_ep::cli
