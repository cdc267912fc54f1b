#pragma once

#include <functional>
#include <vector>

#include "multi/fault_play.hpp"

namespace deep_ep::test {

constexpr int kRanks = 3;
constexpr int kVictim = 1;

/// What a call of a test may use. The victim changes what it gives.
struct Scene {
  Buffer& buffer;
  const Exchange& exchange;
  const DispatchResult& dispatched;
  bool victim;
};

struct Situation {
  const char* name;
  std::function<void(const Scene&)> call;
  const char* field;  ///< that every rank's Error must name
};

/// One rank calls with something else than the others; all are told.
const std::vector<Situation>& disagreements();
/// One rank's arguments are refused; all are told.
const std::vector<Situation>& refusals();

}  // namespace deep_ep::test
