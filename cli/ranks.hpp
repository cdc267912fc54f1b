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

/// Runs `body` on every rank: in this process with a launcher, else in forked ones. An exception is
/// reported once for all ranks, and ranks that died by a signal are named. Forked ranks that go on
/// for the timeout after one has failed are killed. Returns the exit status.
int run_ranks(int ranks, const std::function<int(std::shared_ptr<Bootstrap>)>& body);

}  // namespace deep_ep::cli
