#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <semaphore>
#include <vector>

#include "protocol/schedule.hpp"

namespace deep_ep::sim {

/// Thrown out of a schedule point of a rank that was stopped, once no other rank is left to see
/// what its unwinding does.
struct StopRank {
  int rank;
};

/// How a run is disturbed. Turns count the schedule points that all ranks reached.
struct Disturbance {
  int switch_percent = 50;    // chance at a point that another rank goes on
  int delay_per_mille = 5;    // chance at a point that the rank is held back
  int delay_turns_max = 400;  // for at most so many turns
  int stop_rank = -1;         // this rank goes no further ...
  int stop_at_point = 0;      // ... than the so many-th point that it reaches
};

/// Runs ranks as threads of which exactly one is awake; at every schedule point a random number
/// decides who goes on. A run depends on nothing but the seed, the disturbance and what the ranks
/// do; time is the number of turns.
class BatonScheduler final : public protocol::Scheduler {
 public:
  static constexpr std::int64_t kTurnNs = 1'000;

  explicit BatonScheduler(std::uint64_t seed, const Disturbance& disturbance = {})
      : random_(seed), disturbance_(disturbance) {}

  /// Plays rank i with ranks[i]; returns when all have ended. An exception other than StopRank ends
  /// its rank and leaves here afterwards.
  void run(const std::vector<std::function<void()>>& ranks);

  void reach(protocol::Point point) override;
  std::int64_t now_ns() override;

  std::uint64_t turns() const { return turns_; }
  bool stopped(int rank) const { return ranks_[rank]->stopped; }

 private:
  struct Rank {
    std::binary_semaphore baton{0};
    std::uint64_t held_until = 0;  // turn
    int points = 0;
    bool stopped = false;
    bool ended = false;
  };

  void play(int rank, const std::function<void()>& body);
  void hand_over(int to);
  int choose();
  std::uint64_t below(std::uint64_t bound) { return random_() % bound; }

  // Only the holder of the baton touches what follows.
  std::mt19937_64 random_;
  Disturbance disturbance_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::atomic<std::uint64_t> turns_ = 0;  // helper threads look at the time, too
  std::exception_ptr error_;
};

}  // namespace deep_ep::sim
