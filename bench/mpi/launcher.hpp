#pragma once

#include "mpi/settings.hpp"

namespace deep_ep::bench {

/// Starts the workers for each number of ranks, prints and writes the results. Returns the exit
/// status.
int launch(const Settings& settings);

}  // namespace deep_ep::bench
