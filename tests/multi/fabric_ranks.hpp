#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "fabric/fabric.hpp"
#include "in_ranks.hpp"

namespace deep_ep::fabric {

using std::chrono::milliseconds;

/// What a Fabric's helper thread reported.
class Reports {
 public:
  explicit Reports(int num_ranks) : gone_(num_ranks) {}

  Fabric::Callbacks callbacks() {
    return {[this](int rank, bool orderly) {
              const std::lock_guard lock(mutex_);
              EXPECT_FALSE(gone_[rank]) << "rank " << rank << " was reported twice";
              gone_[rank] = orderly;
              changed_.notify_all();
            },
            [this](int, int, std::byte*) {
              const std::lock_guard lock(mutex_);
              changed_.notify_all();
            }};
  }

  /// Whether the peer went orderly; nothing if it is still there after `timeout`.
  std::optional<bool> gone(int rank, milliseconds timeout) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, timeout, [&] { return gone_[rank].has_value(); });
    return gone_[rank];
  }

  template <class Condition>
  bool wait(milliseconds timeout, Condition&& condition) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, timeout, condition);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::optional<bool>> gone_;
};

/// One rank with a first segment of `bytes`, joined to all others.
struct JoinedRank {
  Reports reports;
  Fabric fabric;

  explicit JoinedRank(Bootstrap& bootstrap, std::int64_t bytes = 4096)
      : reports(bootstrap.size()), fabric(bootstrap.rank(), bootstrap.size(), make_memfd_memory()) {
    fabric.add_segment(bytes);
    fabric.open_handles(bootstrap.all_gather(fabric.export_handles()), milliseconds(20000),
                        reports.callbacks());
  }
};

/// Non-zero and different for each rank, segment and word.
inline std::uint32_t word(int rank, int segment, std::size_t index) {
  return static_cast<std::uint32_t>(1 + rank + 10 * segment + 1000 * index);
}

inline void fill(const Fabric& fabric, int segment, std::size_t words) {
  auto* data = reinterpret_cast<std::uint32_t*>(fabric.base(fabric.rank(), segment));
  for (std::size_t i = 0; i < words; ++i) data[i] = word(fabric.rank(), segment, i);
}

inline void expect_filled(const Fabric& fabric, int rank, int segment, std::size_t words) {
  const auto* data = reinterpret_cast<const std::uint32_t*>(fabric.base(rank, segment));
  ASSERT_NE(data, nullptr) << "segment " << segment << " of rank " << rank;
  for (std::size_t i = 0; i < words; ++i) ASSERT_EQ(data[i], word(rank, segment, i));
}

}  // namespace deep_ep::fabric
