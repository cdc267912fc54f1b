#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <vector>

namespace deep_ep::fabric {

/// Base addresses by rank and segment. Read by any thread without waiting; each entry is set once.
class SegmentTable {
 public:
  /// A segment is at least a growth step of results, so more than a machine's memory.
  static constexpr int kMaxSegments = 1024;

  explicit SegmentTable(int num_ranks) {
    for (int i = 0; i < num_ranks; ++i) rows_.push_back(std::make_unique<Row>());
  }

  std::byte* get(int rank, int segment) const noexcept {
    if (rank < 0 || rank >= static_cast<int>(rows_.size())) return nullptr;
    if (segment < 0 || segment >= kMaxSegments) return nullptr;
    // acquire: pairs with set(); what the mapping thread did to the memory is visible.
    return (*rows_[rank])[segment].load(std::memory_order_acquire);
  }
  void set(int rank, int segment, std::byte* base) noexcept {
    (*rows_[rank])[segment].store(base, std::memory_order_release);
  }
  void clear() noexcept {
    for (auto& row : rows_) {
      for (auto& entry : *row) entry.store(nullptr, std::memory_order_release);
    }
  }

 private:
  using Row = std::array<std::atomic<std::byte*>, kMaxSegments>;
  std::vector<std::unique_ptr<Row>> rows_;
};

}  // namespace deep_ep::fabric
