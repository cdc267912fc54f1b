#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <vector>

#include "backend/host/context.hpp"
#include "backend/host/rows.hpp"
#include "deep_ep/error.hpp"

namespace deep_ep::host {

// Rows that one side of a lane handles before the other side's turn: keeps what is in flight in the
// caches.
constexpr int kRowsPerStep = 8;

/// The longest time that lanes stood still for each rank.
class WaitTimes {
 public:
  explicit WaitTimes(int num_ranks) : longest_(num_ranks, 0) {}

  void add(const std::vector<Missing>& awaited, std::int64_t ns) {
    for (const Missing& one : awaited) longest_[one.rank] = std::max(longest_[one.rank], ns);
  }
  /// Of lanes that ran at the same time.
  void join(const WaitTimes& other) {
    for (std::size_t i = 0; i < longest_.size(); ++i)
      longest_[i] = std::max(longest_[i], other.longest_[i]);
  }
  /// wait_stats: += [R], or null.
  void add_to(std::int64_t* wait_stats) const {
    if (wait_stats == nullptr) return;
    for (const std::int64_t ns : longest_) *wait_stats++ += ns;
  }

 private:
  std::vector<std::int64_t> longest_;
};

/// Works on every `stride`-th lane until all are done. A Lane has step(), which moves what can be
/// moved now and says whether that was anything, done(), and missing().
template <class Lane>
void run_lanes(std::vector<Lane>& lanes, int first, int stride, Context& context, const Call& call,
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
    context.wait(call, "rows or room for rows", step_all, missing);
    times.add(awaited, (std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1));
  }
  finish_stores();
}

/// All lanes of a call among `num_ranks` ranks, on this rank's threads. How long they stood still.
template <class Lane>
WaitTimes run_all_lanes(std::vector<Lane>& lanes, int num_ranks, Context& context,
                        const Call& call) {
  const int threads =
      std::min({context.pool().size(), call.num_threads, static_cast<int>(lanes.size())});
  std::vector<WaitTimes> times(threads, WaitTimes(num_ranks));
  context.pool().run(threads, [&](int thread) {
    try {
      run_lanes(lanes, thread, threads, context, call, times[thread]);
    } catch (const Error& error) {
      // The other threads of this rank wait for rows that may never come.
      context.raise_fault(error);
      throw;
    } catch (const std::exception& error) {
      context.raise_fault(Error(ErrorCode::kOutOfMemory,
                                fmt::format("{} (call {}) on rank {}: {}", call.operation,
                                            call.epoch, context.global_rank(), error.what())));
      throw;
    }
  });
  WaitTimes longest(num_ranks);
  for (const WaitTimes& one : times) longest.join(one);
  return longest;
}

}  // namespace deep_ep::host
