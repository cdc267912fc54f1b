#include "verify/low_latency_turns.hpp"

#include <algorithm>

namespace deep_ep::verify {
namespace {

void add_turns_in_pairs(std::vector<Turn>& turns, const LowLatencyCase& c, bool combine, int rank) {
  const int count = combine ? c.combines : c.dispatches;
  const bool reversed =
      c.hooks == Hooks::kTwoReversed || (c.hooks == Hooks::kTwoByRank && rank % 2 == 1);
  for (int i = 0; i < count; i += 2) {
    const int end = std::min(i + 2, count);
    for (int number = i; number < end; ++number) turns.push_back({combine, number, true});
    for (int number = i; number < end; ++number)
      turns.push_back({combine, reversed ? i + end - 1 - number : number, false});
  }
}

}  // namespace

int dispatch_of(const LowLatencyCase& c, int combine) {
  if (c.hooks == Hooks::kCrossed) return combine % c.dispatches;
  return c.dispatches - 1 - combine % c.dispatches;
}

std::vector<Turn> make_turns(const LowLatencyCase& c, int rank) {
  std::vector<Turn> turns;
  const auto add_whole = [&](bool combine, int number) {
    turns.push_back({combine, number, true});
    turns.push_back({combine, number, false});
  };
  if (c.hooks == Hooks::kCrossed) {
    for (int i = 0; i < c.dispatches; ++i) {
      const bool crossed = i > 0 && i - 1 < c.combines;
      turns.push_back({false, i, true});
      if (crossed) turns.push_back({true, i - 1, true});
      if (crossed && rank % 2 == 1) turns.push_back({true, i - 1, false});
      turns.push_back({false, i, false});
      if (crossed && rank % 2 == 0) turns.push_back({true, i - 1, false});
    }
    for (int i = c.dispatches - 1; i < c.combines; ++i) add_whole(true, i);
  } else if (c.hooks == Hooks::kNone || c.hooks == Hooks::kEach) {
    for (int i = 0; i < c.dispatches; ++i) add_whole(false, i);
    for (int i = 0; i < c.combines; ++i) add_whole(true, i);
  } else {
    add_turns_in_pairs(turns, c, false, rank);
    add_turns_in_pairs(turns, c, true, rank);
  }
  return turns;
}

}  // namespace deep_ep::verify
