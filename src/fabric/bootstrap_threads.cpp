#include <condition_variable>
#include <mutex>
#include <optional>

#include "base/env.hpp"
#include "base/error.hpp"
#include "deep_ep/bootstrap.hpp"
#include "fabric/bootstrap_star.hpp"
#include "fabric/socket.hpp"

namespace deep_ep {
namespace {

using Parts = std::vector<std::string>;

/// Where the threads of one group meet.
class Meeting {
 public:
  Meeting(int size, std::chrono::milliseconds timeout)
      : timeout_(timeout), slots_(size), arrived_(size, false), gone_(size, false) {}

  Parts all_gather(int rank, std::string_view bytes) {
    std::unique_lock lock(mutex_);
    if (failure_) throw *failure_;
    if (arrived_[rank])
      throw Error(ErrorCode::kUsage,
                  fmt::format("bootstrap: two threads call all_gather as rank {}", rank));
    slots_[rank] = bytes;
    arrived_[rank] = true;
    const std::shared_ptr<Round> round = round_;
    if (absent().empty()) {
      finish_round();
    } else {
      fail_if_gone();
      wait(lock, *round);
    }
    if (!round->done) throw *failure_;
    return round->all;
  }

  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    gone_[rank] = true;
    // Only ranks that already wait for this one are told; a later call finds out itself.
    if (absent().size() < slots_.size()) fail_if_gone();
  }

 private:
  struct Round {
    bool done = false;
    Parts all;
  };

  void wait(std::unique_lock<std::mutex>& lock, const Round& round) {
    const fabric::Deadline deadline(timeout_);
    const auto over = [&] { return round.done || failure_; };
    if (changed_.wait_until(lock, deadline.end(), over)) return;
    const std::vector<int> missing = absent();
    fail(Error(ErrorCode::kTimeout,
               fmt::format("bootstrap: {} did not come to an all_gather within {} ms",
                           fabric::name_ranks(missing), timeout_.count()),
               missing));
  }

  std::vector<int> absent() const {
    std::vector<int> ranks;
    for (std::size_t i = 0; i < arrived_.size(); ++i) {
      if (!arrived_[i]) ranks.push_back(static_cast<int>(i));
    }
    return ranks;
  }

  void finish_round() {
    round_->all = std::exchange(slots_, Parts(slots_.size()));
    round_->done = true;
    round_ = std::make_shared<Round>();
    arrived_.assign(arrived_.size(), false);
    changed_.notify_all();
  }

  void fail_if_gone() {
    std::vector<int> lost;
    for (const int rank : absent()) {
      if (gone_[rank]) lost.push_back(rank);
    }
    if (lost.empty()) return;
    fail(Error(ErrorCode::kPeerFailed,
               fmt::format("bootstrap: {} left before an all_gather", fabric::name_ranks(lost)),
               lost));
  }

  void fail(const Error& error) {
    if (!failure_) failure_.emplace(error);
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::chrono::milliseconds timeout_;
  Parts slots_;
  std::vector<bool> arrived_;
  std::vector<bool> gone_;
  std::shared_ptr<Round> round_ = std::make_shared<Round>();
  std::optional<Error> failure_;
};

class ThreadRank final : public Bootstrap {
 public:
  ThreadRank(int rank, int size, std::shared_ptr<Meeting> meeting)
      : rank_(rank), size_(size), meeting_(std::move(meeting)) {}
  ~ThreadRank() override { meeting_->leave(rank_); }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  Parts all_gather(std::string_view bytes) override { return meeting_->all_gather(rank_, bytes); }

 private:
  int rank_;
  int size_;
  std::shared_ptr<Meeting> meeting_;
};

}  // namespace

std::vector<std::shared_ptr<Bootstrap>> bootstrap_threads(int size,
                                                          std::chrono::milliseconds timeout) {
  require(size >= 1, "size: {} is not allowed, must be at least 1", size);
  env::require_timeout(timeout, 1);
  const auto meeting = std::make_shared<Meeting>(size, timeout);
  std::vector<std::shared_ptr<Bootstrap>> ranks;
  for (int i = 0; i < size; ++i) ranks.push_back(std::make_shared<ThreadRank>(i, size, meeting));
  return ranks;
}

}  // namespace deep_ep
