#pragma once

#include <vector>

#include "verify/low_latency_case.hpp"

namespace deep_ep::verify {

/// A part of a call, in the order in which a rank plays them.
struct Turn {
  bool combine;
  int number;
  bool send;  // without hooks the whole call; then the other part only looks at the results
};
std::vector<Turn> make_turns(const LowLatencyCase& c, int rank);
/// Which dispatch a combine belongs to.
int dispatch_of(const LowLatencyCase& c, int combine);

}  // namespace deep_ep::verify
