#pragma once

#include "mpi/settings.hpp"

namespace deep_ep::bench {

/// What every line of results that a worker prints starts with; JSON follows.
inline constexpr const char* kResultPrefix = "bench_mpi result: ";

/// Under mpirun: only the time of MPI's exchange, to choose a transport.
int run_probe(const Settings& settings);
/// Under mpirun: everything.
int run_worker(const Settings& settings);
/// The same for low latency.
int run_low_latency_worker(const Settings& settings);

}  // namespace deep_ep::bench
