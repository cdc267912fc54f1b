#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace deep_ep::fabric {

/// A block of an own segment.
struct Block {
  int segment = -1;
  std::int64_t offset = 0;
  std::int64_t bytes = 0;
};

/// Hands out blocks of segments: first fit, neighbours merged on free, 128-byte aligned.
/// Thread-safe: results may be released by any thread.
class Heap {
 public:
  static constexpr std::int64_t kAlignment = 128;

  /// `grow(bytes)` adds a segment of at least that size and returns its index and size; its Error
  /// leaves the heap as it was.
  struct NewSegment {
    int segment;
    std::int64_t bytes;
  };
  explicit Heap(std::function<NewSegment(std::int64_t)> grow) : grow_(std::move(grow)) {}

  /// Gives bytes [begin, end) of `segment` to the heap.
  void add(int segment, std::int64_t begin, std::int64_t end);
  /// Grows when nothing fits. `bytes` 0 counts as 1.
  Block allocate(std::int64_t bytes);
  /// Without growth.
  std::optional<Block> try_allocate(std::int64_t bytes);
  /// Needs no memory itself: results are released in destructors.
  void free(const Block& block);
  /// Grows until a block of `bytes` fits.
  void reserve(std::int64_t bytes);

  std::int64_t live_bytes() const;
  std::int64_t free_bytes() const;

 private:
  struct Key {
    int segment;
    std::int64_t offset;
    friend auto operator<=>(const Key&, const Key&) = default;
  };
  bool take(std::int64_t bytes, Block& block);
  bool fits(std::int64_t bytes) const;
  using Parts = std::map<Key, std::int64_t>;  // begin -> bytes
  void add_part(int segment, std::int64_t offset, std::int64_t bytes);
  void give(Parts::node_type part);

  std::mutex grow_mutex_;  // one growth at a time; taken before mutex_
  mutable std::mutex mutex_;
  Parts free_;
  std::vector<Parts::node_type> spare_;  // one for each block that is out
  std::int64_t live_bytes_ = 0;
  std::function<NewSegment(std::int64_t)> grow_;
};

}  // namespace deep_ep::fabric
