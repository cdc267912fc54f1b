#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/epoch.hpp"

namespace deep_ep::protocol {

// A bounded ring of bytes from one rank to another, kept over calls. Positions count bytes (I7) and
// only grow, so calls with different row sizes follow each other without a reset. A record is
// contiguous: one that would cross the end of the ring starts at its beginning instead. Both sides
// know the sequence of record sizes, so both compute the same positions. A record's address is as
// aligned as all sizes before it and the ring's own size are.
//
// Neither side may wait for the other with something withheld: the sender publishes what it has
// written before it waits for credits, the receiver releases what it has read before it waits for
// records. Then records up to max_record() always get through.
//
//   tail  lives at the receiver, published by the sender: bytes up to here are written
//   head  lives at the sender, published by the receiver: bytes up to here may be overwritten (the
//   credits)

struct RingShape {
  std::int64_t bytes = 0;

  /// Where a record of `size` bytes starts if the record before it ended at `position`.
  DEEP_EP_HD std::uint64_t record_begin(std::uint64_t position, std::int64_t size) const {
    const std::uint64_t offset = position % static_cast<std::uint64_t>(bytes);
    return offset + size <= static_cast<std::uint64_t>(bytes) ? position
                                                              : position - offset + bytes;
  }
  /// Records are at most a quarter of the ring, so that one can be written while others are read.
  DEEP_EP_HD std::int64_t max_record() const { return bytes / 4; }
};

/// The sender's end. Plain data, owned by one thread at a time.
struct RingSender {
  RingShape shape;
  std::byte* data;        // at the receiver
  EpochFlag* tail;        // at the receiver
  const EpochFlag* head;  // here
  std::uint64_t written;  // end of the last record written
  std::uint64_t freed;    // last head seen

  /// Where to write the next record of `size` bytes, or null while the receiver still holds that
  /// space.
  DEEP_EP_HD std::byte* reserve(std::int64_t size) {
    const std::uint64_t begin = shape.record_begin(written, size);
    if (begin + size > freed + shape.bytes) {
      refresh_credits();
      if (begin + size > freed + shape.bytes) return nullptr;
    }
    return data + begin % static_cast<std::uint64_t>(shape.bytes);
  }
  /// acquire: pairs with RingReceiver::release; the receiver's reads of that space are done.
  DEEP_EP_HD void refresh_credits() { freed = load_acquire(&head->value); }
  DEEP_EP_HD void advance(std::int64_t size) { written = shape.record_begin(written, size) + size; }
  /// All records advanced over so far are visible to the receiver.
  DEEP_EP_HD void publish() { tail->publish(written); }
};

/// The receiver's end. Plain data, owned by one thread at a time.
struct RingReceiver {
  RingShape shape;
  const std::byte* data;   // here
  const EpochFlag* tail;   // here
  EpochFlag* head;         // at the sender
  std::uint64_t consumed;  // end of the last record read
  std::uint64_t arrived;   // last tail seen

  /// The next record of `size` bytes, or null while it has not arrived.
  DEEP_EP_HD const std::byte* peek(std::int64_t size) {
    const std::uint64_t begin = shape.record_begin(consumed, size);
    if (begin + size > arrived) {
      // acquire: pairs with RingSender::publish; the record's bytes are here.
      arrived = load_acquire(&tail->value);
      if (begin + size > arrived) return nullptr;
    }
    return data + begin % static_cast<std::uint64_t>(shape.bytes);
  }
  DEEP_EP_HD void advance(std::int64_t size) {
    consumed = shape.record_begin(consumed, size) + size;
  }
  /// Returns the credits of all records advanced over so far: this thread's reads of them are done.
  DEEP_EP_HD void release() { head->publish(consumed); }
};

}  // namespace deep_ep::protocol
