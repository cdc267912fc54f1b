#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace deep_ep::fabric {

/// What a rank handed to the transport so far, own bookkeeping included only where it says so.
struct TransportCounts {
  std::int64_t puts = 0;
  std::int64_t put_bytes = 0;
  std::int64_t signals = 0;
};

/// Memory of the same size on every rank, of all nodes, that others write to by offset: puts and
/// signals over a network. Collective to make; all calls, and destruction, are local. Any thread;
/// order is promised among the calls of one thread only. Throws Error(kPeerFailed) naming the rank
/// once the transport has found it gone, Error(kInvalidArgument) for ranges outside of the heap.
class SymmetricHeap {
 public:
  virtual ~SymmetricHeap() = default;

  /// This rank's heap: zero at first, 128-byte aligned.
  virtual std::byte* base() const noexcept = 0;
  virtual std::int64_t bytes() const noexcept = 0;

  /// Starts to copy `bytes` bytes to offset `offset` of `rank`'s heap. `source` stays valid and
  /// unchanged until flush() of that rank.
  virtual void put(int rank, std::int64_t offset, const void* source, std::int64_t bytes) = 0;
  /// Sets the 64-bit word at `offset` of `rank`'s heap, 8-byte aligned, behind all earlier puts and
  /// signals of this thread to that rank: a release that pairs with an acquire load of the word.
  virtual void signal(int rank, std::int64_t offset, std::uint64_t value) = 0;
  /// Waits until the sources of all earlier puts of this thread to `rank` may be changed. False if
  /// the time was up first.
  virtual bool flush(int rank, std::chrono::milliseconds timeout) = 0;

  /// True once the transport knows that `rank` cannot be reached any more, also because it has
  /// destroyed its heap; what it sent before that may have come. Never blocks.
  virtual bool lost(int rank) const noexcept = 0;
  virtual TransportCounts counts() const noexcept = 0;
};

}  // namespace deep_ep::fabric
