#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "backend/host/internode/state.hpp"

namespace deep_ep::host::internode {

// Rows that one side of a lane handles before the other side's turn: keeps what is in flight in the
// caches.
constexpr int kRowsPerStep = 8;

/// The longest time that the lanes of one thread stood still for each rank.
class WaitTimes {
 public:
  explicit WaitTimes(int num_ranks) : longest_(num_ranks, 0) {}
  void add(const std::vector<Missing>& awaited, std::int64_t ns) {
    for (const Missing& one : awaited) longest_[one.rank] = std::max(longest_[one.rank], ns);
  }
  const std::vector<std::int64_t>& longest() const { return longest_; }

 private:
  std::vector<std::int64_t> longest_;
};

/// Works on every `stride`-th lane until all are done. A Lane has step(), which moves what can be
/// moved now and says whether that was anything, done(), and missing().
template <class Lane>
void run_lanes(std::vector<Lane>& lanes, int first, int stride, State& state, const Call& call,
               WaitTimes& times) {
  const int count = static_cast<int>(lanes.size());
  const auto all_done = [&] {
    for (int i = first; i < count; i += stride)
      if (!lanes[i].done()) return false;
    return true;
  };
  const auto step_all = [&] {
    bool moved = false;
    for (int i = first; i < count; i += stride)
      if (!lanes[i].done()) moved |= lanes[i].step();
    return moved || all_done();
  };
  const auto missing = [&] {
    std::vector<Missing> list;
    for (int i = first; i < count; i += stride) {
      if (lanes[i].done()) continue;
      for (const Missing& one : lanes[i].missing()) list.push_back(one);
    }
    return list;
  };
  while (!all_done()) {
    if (step_all()) continue;
    const std::vector<Missing> awaited = missing();
    const auto start = std::chrono::steady_clock::now();
    state.context().wait(call, "rows or room for rows", step_all, missing);
    times.add(awaited, (std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1));
  }
}

/// All lanes of a call, on this rank's threads. wait_stats: += [R], or null.
template <class Lane>
void run_all_lanes(std::vector<Lane>& lanes, State& state, const Call& call,
                   std::int64_t* wait_stats) {
  Context& context = state.context();
  const int num_ranks = state.topology().num_ranks;
  const int threads =
      std::min({context.pool().size(), call.num_threads, static_cast<int>(lanes.size())});
  std::vector<WaitTimes> times(threads, WaitTimes(num_ranks));
  context.pool().run(threads, [&](int thread) {
    try {
      run_lanes(lanes, thread, threads, state, call, times[thread]);
    } catch (const Error& error) {
      // The other threads of this rank wait for rows that may never come.
      context.raise_fault(error);
      throw;
    }
  });
  if (wait_stats == nullptr) return;
  for (int i = 0; i < num_ranks; ++i) {
    std::int64_t longest = 0;
    for (const WaitTimes& one : times) longest = std::max(longest, one.longest()[i]);
    wait_stats[i] += longest;
  }
}

}  // namespace deep_ep::host::internode
