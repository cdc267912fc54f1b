#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "namespaces.hpp"

namespace deep_ep::bench {

struct ExchangeSettings {
  std::int64_t tokens = 4096;  ///< of a rank
  std::int64_t hidden = 7168;
  int topk = 8;
  int experts = 256;
  int ranks_per_node = 2;
  int iterations = 3;
  int threads = 0;  ///< of a rank; 0: as the library chooses
};

/// All calls of one kind between two nodes, the results of each compared with the reference.
/// Directions are by the sending node.
struct CallFigures {
  std::array<std::int64_t, 2> records{};  ///< that cross in one call, as the routing says
  std::array<std::int64_t, 2> bytes{};    ///< of these
  std::vector<double> seconds{};          ///< of each call's slowest rank
  std::vector<double> veth_vs_plan{};     ///< what the nodes' devices sent, both nodes of each call
  std::int64_t checked_elements = 0;
  std::int64_t wrong_elements = 0;
  /// Ranks and calls whose counts of records, of their bytes, or of all bytes put are not those of
  /// the plan.
  std::int64_t miscounted = 0;
  std::string trouble{};  ///< the first of those, or the first wrong element

  /// Bytes a second of each call, of the direction that has fewer.
  std::vector<double> bandwidths() const;
  void merge(const CallFigures& other);
};

struct ExchangeFigures {
  CallFigures dispatch;
  CallFigures combine;
};

/// Cached dispatches and combines of new Buffers.
ExchangeFigures measure_exchange(const net::Namespaces& nodes, const ExchangeSettings& settings);

}  // namespace deep_ep::bench
