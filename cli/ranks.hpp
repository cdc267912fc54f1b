#pragma once

#include <functional>
#include <memory>

#include <CLI/CLI.hpp>

#include "deep_ep/bootstrap.hpp"

namespace deep_ep::cli {

/// How many ranks a command runs on: the launcher's, if one started this process (RANK and
/// WORLD_SIZE, or those of Open MPI or Slurm), else `asked`. Throws Error(kInvalidArgument) if the
/// two contradict each other; 0 means not asked.
int count_ranks(int asked, int preset);

/// --nodes and --ranks-per-node of commands that also run on one node.
struct NodeOptions {
  int nodes = 1;
  int ranks_per_node = 2;

  void add_to(CLI::App& command);
  /// Of a case: 0 for one node.
  int node_size() const { return nodes > 1 ? ranks_per_node : 0; }
  /// count_ranks(), or, with several nodes, which this machine's ranks then pose as, their product.
  int count_ranks(int asked, int preset) const;
};

/// Makes the ranks of this machine pose as nodes of so many, unless a launcher started them.
void pose_as_nodes(int ranks_per_node);

/// Runs `body` on every rank: in this process with a launcher, else in forked ones. An exception is
/// reported once for all ranks, and ranks that died by a signal are named. Returns the exit status.
int run_ranks(int ranks, const std::function<int(std::shared_ptr<Bootstrap>)>& body);

}  // namespace deep_ep::cli
