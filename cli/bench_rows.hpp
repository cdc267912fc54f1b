#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "deep_ep/bootstrap.hpp"

namespace deep_ep::cli {

/// One operation at one shape, the times being those of the slowest rank of each iteration.
struct BenchRow {
  std::string operation;
  std::vector<double> times_us{};
  std::vector<double> host_us{};  ///< on GPUs: until the calls were queued
  double logical_bytes = 0;       ///< received payload (x, scales), mean of the ranks
  double wire_bytes = 0;          ///< without the rows that a rank sends to itself
  double node_bytes = 0;          ///< to other nodes, over the network or what stands for it
  std::int64_t checked_elements = 0;
  std::int64_t wrong_elements = 0;
  std::string first_mismatch{};
};

/// Collective: all ranks' rows in one, the same on every rank.
std::vector<BenchRow> merge_rows(Bootstrap& bootstrap, std::vector<BenchRow> rows);

}  // namespace deep_ep::cli
