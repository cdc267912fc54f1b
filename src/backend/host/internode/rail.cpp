#include "backend/host/internode/rail.hpp"

#include <cstring>

namespace deep_ep::host::internode {

std::byte* RailSender::reserve(std::int64_t bytes) {
  const protocol::RingShape& shape = place_.shape;
  const std::uint64_t begin = shape.record_begin(written_, bytes);
  const std::uint64_t end = begin + bytes;
  if (end > freed_ + shape.bytes) {
    refresh();
    if (end > freed_ + shape.bytes) return nullptr;
  }
  // The mirror is written behind the flush of what was put from there.
  if (end > flushed_ + shape.bytes && !flush()) return nullptr;
  const std::uint64_t at = begin % static_cast<std::uint64_t>(shape.bytes);
  if (at == 0) {  // one put does not cross the end of the ring
    put_written();
    written_ = put_ = begin;
  }
  return mirror_ + at;
}

void RailSender::put_written() {
  if (put_ == written_) return;
  const std::uint64_t at = put_ % static_cast<std::uint64_t>(place_.shape.bytes);
  unless_lost(heap_, place_.peer, [&] {
    heap_.put(place_.peer, place_.data + static_cast<std::int64_t>(at), mirror_ + at,
              static_cast<std::int64_t>(written_ - put_));
  });
  put_ = written_;
}

void RailSender::publish() {
  if (!has_unpublished()) return;
  put_written();
  // release: pairs with the acquire in RailReceiver::peek().
  unless_lost(heap_, place_.peer, [&] { heap_.signal(place_.peer, place_.tail, written_); });
  told_ = written_;
}

// The receiver has read what lies there, so this does not last; and it may have left by now.
bool RailSender::flush() {
  if (flushed_ == put_) return true;
  constexpr std::chrono::milliseconds kPatience(20);
  const std::uint64_t end = put_;
  bool flushed = true;
  unless_lost(heap_, place_.peer, [&] { flushed = heap_.flush(place_.peer, kPatience); });
  if (flushed) flushed_ = end;
  return flushed;
}

bool RailSender::idle() {
  if (freed_ != written_) refresh();
  return freed_ == written_ && flush();
}

const std::byte* RailReceiver::peek(std::int64_t bytes) {
  const std::uint64_t begin = place_.shape.record_begin(consumed_, bytes);
  if (begin + bytes > arrived_) {
    // acquire: pairs with RailSender::publish(); the bytes are here.
    arrived_ =
        protocol::load_acquire(reinterpret_cast<const std::uint64_t*>(heap_.base() + place_.tail));
    if (begin + bytes > arrived_) return nullptr;
  }
  return heap_.base() + place_.data + begin % static_cast<std::uint64_t>(place_.shape.bytes);
}

const std::byte* RailReceiver::row(std::int64_t row_bytes) {
  const std::int64_t most = place_.shape.max_record() / 64 * 64;
  if (row_bytes <= most) return peek(row_bytes);
  gathered_.resize(row_bytes);
  while (row_done_ < row_bytes) {
    const std::int64_t bytes = std::min(most, row_bytes - row_done_);
    const std::byte* piece = peek(bytes);
    if (piece == nullptr) return nullptr;
    std::memcpy(gathered_.data() + row_done_, piece, bytes);
    consumed_ = place_.shape.record_begin(consumed_, bytes) + bytes;
    row_done_ += bytes;
  }
  return gathered_.data();
}

void RailReceiver::pop(std::int64_t row_bytes) {
  if (row_done_ == 0) {
    consumed_ = place_.shape.record_begin(consumed_, row_bytes) + row_bytes;
  }
  row_done_ = 0;
}

void RailReceiver::release() {
  if (told_ == consumed_) return;
  // release: pairs with the acquire in RailSender::refresh().
  unless_lost(heap_, place_.peer, [&] { heap_.signal(place_.peer, place_.head, consumed_); });
  told_ = consumed_;
}

}  // namespace deep_ep::host::internode
