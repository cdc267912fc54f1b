#pragma once

#include <CLI/CLI.hpp>

#include "deep_ep/bootstrap.hpp"
#include "plan/topology.hpp"

namespace deep_ep::cli {

/// What a command over several nodes was asked for; 0: nothing.
struct NodesAsked {
  int nodes = 0;
  int ranks_per_node = 0;

  bool several() const { return nodes > 0 || ranks_per_node > 0; }
};

/// Of a command over several nodes, or, `may_be_one`, one that runs on one node unless they are
/// given.
void add_node_options(CLI::App& command, NodesAsked& asked, bool may_be_one = false);

/// How many ranks such a command runs on: the launcher's, else so many of this machine, which pose
/// as nodes, as they do with a launcher if ranks_per_node was asked for. Before a rank is forked or
/// a thread started. Throws Error(kInvalidArgument) if what was asked for contradicts the launcher
/// or DEEP_EP_RANKS_PER_NODE.
int count_node_ranks(const NodesAsked& asked);

/// The same where all ranks may be of one node, in which case it is count_ranks(ranks, preset).
int count_ranks(int ranks, int preset, const NodesAsked& asked);

/// Collective, on every rank: the nodes that its Buffers will have. Throws
/// Error(kInvalidArgument) if there is only one, or others than were asked for. From then on the
/// size hints count these nodes.
plan::Topology find_nodes(Bootstrap& bootstrap, const NodesAsked& asked);

/// The same where all ranks may be of one node: ranks of a node, or 0 unless several were asked
/// for.
int find_ranks_per_node(Bootstrap& bootstrap, const NodesAsked& asked);

}  // namespace deep_ep::cli
