#include "baton_scheduler.hpp"

#include <exception>
#include <thread>

namespace deep_ep::sim {
namespace {

thread_local int this_rank = -1;

}  // namespace

void BatonScheduler::run(const std::vector<std::function<void()>>& ranks) {
  ranks_.clear();
  for (std::size_t i = 0; i < ranks.size(); ++i) ranks_.push_back(std::make_unique<Rank>());
  protocol::scheduler = this;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < ranks.size(); ++i)
    threads.emplace_back([&, i] { play(static_cast<int>(i), ranks[i]); });
  ranks_[choose()]->baton.release();
  for (std::thread& thread : threads) thread.join();
  protocol::scheduler = nullptr;
  if (error_) std::rethrow_exception(error_);
}

void BatonScheduler::play(int rank, const std::function<void()>& body) {
  this_rank = rank;
  Rank& self = *ranks_[rank];
  self.baton.acquire();
  try {
    body();
  } catch (const StopRank&) {
  } catch (...) {
    if (!error_) error_ = std::current_exception();
  }
  self.ended = true;
  const int next = choose();
  if (next >= 0) ranks_[next]->baton.release();
}

void BatonScheduler::reach(protocol::Point point) {
  if (this_rank < 0) {  // a helper thread of a rank: not ours to order
    std::this_thread::yield();
    return;
  }
  Rank& self = *ranks_[this_rank];
  if (self.stopped) return;  // unwinding, alone
  ++turns_;
  ++self.points;
  if (this_rank == disturbance_.stop_rank && self.points >= disturbance_.stop_at_point) {
    self.stopped = true;
    hand_over(choose());
    throw StopRank{this_rank};
  }
  if (below(1000) < static_cast<std::uint64_t>(disturbance_.delay_per_mille))
    self.held_until = turns_ + below(disturbance_.delay_turns_max);
  const bool waits = point == protocol::Point::kWait;
  const bool held = self.held_until > turns_;
  if (waits || held || below(100) < static_cast<std::uint64_t>(disturbance_.switch_percent))
    hand_over(choose());
}

void BatonScheduler::hand_over(int to) {
  if (to == this_rank) return;
  ranks_[to]->baton.release();
  ranks_[this_rank]->baton.acquire();
}

// One of the ranks that may go on, else the one that is held back the shortest, else a stopped one
// (so that its thread can end), else -1.
int BatonScheduler::choose() {
  std::vector<int> free;
  int first_held = -1;
  int stopped = -1;
  for (int i = 0; i < static_cast<int>(ranks_.size()); ++i) {
    const Rank& rank = *ranks_[i];
    if (rank.ended) continue;
    if (rank.stopped) {
      stopped = i;
    } else if (rank.held_until <= turns_) {
      free.push_back(i);
    } else if (first_held < 0 || rank.held_until < ranks_[first_held]->held_until) {
      first_held = i;
    }
  }
  if (!free.empty()) return free[below(free.size())];
  if (first_held < 0) return stopped;
  turns_ = ranks_[first_held]->held_until;
  return first_held;
}

std::int64_t BatonScheduler::now_ns() { return static_cast<std::int64_t>(turns_) * kTurnNs; }

}  // namespace deep_ep::sim
