#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "verify/case.hpp"
#include "verify/low_latency_case.hpp"

namespace deep_ep::test {

/// One exchange on one of the program's Buffers.
struct Step {
  int buffer = 0;
  verify::Case exchange{};
  std::optional<verify::LowLatencyCase> low_latency{};  ///< in place of `exchange`

  std::string describe() const {
    return low_latency ? low_latency->describe() : exchange.describe();
  }
};

/// What one job of the pool does: exchanges, one after the other, on one or several Buffers.
struct Program {
  std::string name{};
  int ranks = 1;
  int ranks_per_node = 0;  ///< DEEP_EP_RANKS_PER_NODE of its Buffers; 0: not set
  std::vector<Step> steps{};
  /// Buffers work at once, a thread each; the steps of one Buffer stay in order.
  bool concurrent = false;
  /// True: the Buffers are new, and destroyed at the end. False: those of earlier programs with as
  /// many ranks go on.
  bool own_buffers = false;
  /// DEEP_EP_FIRST_TICKET of its Buffers, which are then its own; 0: as it is.
  std::int64_t first_ticket = 0;

  /// In one line, and with a line for each step.
  std::string summary() const;
  std::string describe() const;
};

/// How much the programs may take. Tokens are scaled down until a program fits.
struct Limits {
  std::int64_t bytes = std::int64_t{192} << 20;  ///< over all ranks, results and checks included
  int max_ranks = 8;
};

/// The most memory that all ranks together need for `exchange`.
std::int64_t estimate_bytes(const verify::Case& exchange);
/// Scales the tokens down until `exchange` fits into `bytes`.
void fit(verify::Case& exchange, std::int64_t bytes);

/// Pairwise covering array over all parameters of an exchange, as programs of one step.
std::vector<Program> covering_programs(std::uint64_t seed, const Limits& limits,
                                       bool several_nodes = false);
/// The named corners.
std::vector<Program> corner_programs(const Limits& limits);
/// A function of the seed alone.
Program random_program(std::uint64_t seed, const Limits& limits, bool several_nodes = false);
/// The named corners of several nodes.
std::vector<Program> internode_corner_programs(const Limits& limits);

// The same for low latency.
std::int64_t estimate_bytes(const verify::LowLatencyCase& exchange);
void fit(verify::LowLatencyCase& exchange, std::int64_t bytes);
std::vector<Program> low_latency_covering_programs(std::uint64_t seed, const Limits& limits);
std::vector<Program> low_latency_corner_programs(const Limits& limits);
Program random_low_latency_program(std::uint64_t seed, const Limits& limits,
                                   bool several_nodes = false);
/// Those of the programs that have two ranks or more, on several nodes.
std::vector<Program> spread_over_nodes(std::vector<Program> programs);

}  // namespace deep_ep::test
