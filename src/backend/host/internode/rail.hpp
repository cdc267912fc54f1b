#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "deep_ep/error.hpp"
#include "fabric/symmetric_heap.hpp"
#include "protocol/ring.hpp"

namespace deep_ep::host::internode {

// The two ends of a bounded ring of rows from one rank to its rail peer, over the symmetric heap.
// Positions count bytes and only grow, as in protocol/ring.hpp, whose rules hold: both ends know
// the sequence of row sizes; neither waits for the other with something withheld. Rows that are
// longer than the most a ring takes as one record go in pieces. What is put lies in a mirror of the
// ring at the sender. At the end of a call rings are empty (RailSender::idle()): so another thread
// may serve them in the next call, though the heap keeps order for each thread only.

/// What a lost rank does not get need not be said here: who waits for it finds out, and names it.
template <class Body>
void unless_lost(const fabric::SymmetricHeap& heap, int rank, Body&& body) {
  try {
    body();
  } catch (const Error&) {
    if (!heap.lost(rank)) throw;
  }
}

/// Where one ring lies; offsets are the heap's, the same on all ranks.
struct RailPlace {
  int peer = 0;  // counted over all nodes
  protocol::RingShape shape;
  std::int64_t data = 0;  // of the receiving end, at the receiver
  std::int64_t tail = 0;  // word at the receiver
  std::int64_t head = 0;  // word at the sender
};

class RailSender {
 public:
  RailSender(fabric::SymmetricHeap& heap, const RailPlace& place, std::byte* mirror)
      : heap_(heap), place_(place), mirror_(mirror) {}

  int peer() const { return place_.peer; }
  /// Writes the next row, as far as there is room; true when it is complete. Until then it is
  /// called again with the same row. fill(offset, bytes, to) writes a part of it.
  template <class Fill>
  bool write_row(std::int64_t row_bytes, Fill&& fill) {
    const std::int64_t most = piece_bytes(row_bytes);
    while (row_done_ < row_bytes) {
      const std::int64_t bytes = std::min(most, row_bytes - row_done_);
      std::byte* to = reserve(bytes);
      if (to == nullptr) return false;
      fill(row_done_, bytes, to);
      written_ += bytes;
      row_done_ += bytes;
    }
    row_done_ = 0;
    return true;
  }

  /// A row is written in part.
  bool in_row() const { return row_done_ > 0; }
  /// Puts what was written since the last time, and tells the receiver.
  void publish();
  bool has_unpublished() const { return told_ != written_; }
  /// The receiver has consumed all, and what was put may be overwritten.
  bool idle();

  std::int64_t in_flight() {
    refresh();
    return static_cast<std::int64_t>(written_ - freed_);
  }
  std::uint64_t written() const { return written_; }
  std::uint64_t freed() const { return freed_; }

  std::int64_t piece_bytes(std::int64_t row_bytes) const {
    return std::min(row_bytes, place_.shape.max_record() / 64 * 64);
  }

 private:
  std::byte* reserve(std::int64_t bytes);
  void put_written();
  /// acquire: pairs with RailReceiver::release(): its reads up to there are done.
  void refresh() {
    freed_ =
        protocol::load_acquire(reinterpret_cast<const std::uint64_t*>(heap_.base() + place_.head));
  }
  bool flush();

  fabric::SymmetricHeap& heap_;
  RailPlace place_;
  std::byte* mirror_;
  std::uint64_t written_ = 0;  // end of what was written to the mirror
  std::uint64_t put_ = 0;      // end of what was put
  std::uint64_t told_ = 0;     // end of what the receiver was told of
  std::uint64_t freed_ = 0;    // last head seen
  std::uint64_t flushed_ = 0;  // up to here the mirror may be overwritten
  std::int64_t row_done_ = 0;  // bytes of the present row that are written
};

class RailReceiver {
 public:
  RailReceiver(fabric::SymmetricHeap& heap, const RailPlace& place) : heap_(heap), place_(place) {}

  int peer() const { return place_.peer; }
  /// The next row, or null while it is not here. Valid until pop().
  const std::byte* row(std::int64_t row_bytes);
  void pop(std::int64_t row_bytes);
  /// Returns the credits of all that was consumed: this thread's reads of it are done.
  void release();

  std::uint64_t consumed() const { return consumed_; }
  std::uint64_t arrived() const { return arrived_; }

 private:
  const std::byte* peek(std::int64_t bytes);

  fabric::SymmetricHeap& heap_;
  RailPlace place_;
  std::uint64_t consumed_ = 0;  // end of the last piece read
  std::uint64_t arrived_ = 0;   // last tail seen
  std::uint64_t told_ = 0;      // credits returned
  std::int64_t row_done_ = 0;   // bytes of a row in pieces that are gathered
  std::vector<std::byte> gathered_;
};

}  // namespace deep_ep::host::internode
