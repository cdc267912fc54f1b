#include "fabric/ucx/heap.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "protocol/atomic.hpp"

namespace deep_ep::fabric::ucx {
namespace {

/// Of a put that is one message of UCX. Its TCP transport moves less than 64 KiB at a time, and
/// puts together in a buffer of its own what is longer; see kForTcp in worker.cpp.
constexpr std::int64_t kPieceBytes = 56 << 10;

}  // namespace

UcxHeap::UcxHeap(int rank, int num_ranks, const SymmetricHeapOptions& options)
    : options_(options),
      rank_(rank),
      memory_(options.memory ? options.memory : allocate_private(options.bytes)),
      context_(make_context(num_ranks)),
      worker_(make_worker(context_.get())),
      event_fd_(event_fd(worker_.get())),
      peers_(static_cast<std::size_t>(num_ranks)) {
  for (int i = 0; i < num_ranks; ++i) {
    peers_[i].heap = this;
    peers_[i].rank = i;
  }
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = 0;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = &UcxHeap::on_message;
  handler.arg = this;
  check(ucp_worker_set_am_recv_handler(worker_.get(), &handler), "ucp_worker_set_am_recv_handler");
}

void UcxHeap::check_rank(int rank) const {
  require(rank >= 0 && rank < static_cast<int>(peers_.size()),
          "rank: {} is not allowed, must be from 0 to {}", rank, peers_.size() - 1);
}

void UcxHeap::check_range(int rank, std::int64_t offset, std::int64_t bytes) const {
  check_rank(rank);
  require(offset >= 0 && bytes >= 0 && bytes <= options_.bytes && offset <= options_.bytes - bytes,
          "offset: {} bytes at {} are outside of the symmetric heap, which has {}", bytes, offset,
          options_.bytes);
}

void UcxHeap::put(int rank, std::int64_t offset, const void* source, std::int64_t bytes) {
  check_range(rank, offset, bytes);
  const auto* from = static_cast<const std::byte*>(source);
  if (rank == rank_ && bytes > 0) std::memcpy(base() + offset, from, bytes);
  for (std::int64_t done = 0; rank != rank_ && done < bytes; done += kPieceBytes) {
    const auto lock = turnstile_.enter();
    send(peers_[rank],
         {.offset = static_cast<std::uint64_t>(offset + done), .source = rank_, .kind = Kind::kPut},
         from + done, static_cast<std::size_t>(std::min(bytes - done, kPieceBytes)));
  }
  num_puts_.fetch_add(1, std::memory_order_relaxed);
  num_put_bytes_.fetch_add(bytes, std::memory_order_relaxed);
}

void UcxHeap::signal(int rank, std::int64_t offset, std::uint64_t value) {
  check_range(rank, offset, sizeof(value));
  require(offset % static_cast<std::int64_t>(sizeof(value)) == 0,
          "offset: {} is not allowed, a signal's word is 8-byte aligned", offset);
  const Word word{static_cast<std::uint64_t>(offset), value};
  if (rank == rank_) {
    set(word);
    if (options_.on_signal) options_.on_signal();
  } else {
    const auto lock = turnstile_.enter();
    send(peers_[rank],
         {.offset = word.offset, .value = value, .source = rank_, .kind = Kind::kSignal}, nullptr,
         0);
  }
  num_signals_.fetch_add(1, std::memory_order_relaxed);
}

void UcxHeap::set(const Word& word) {
  // I16: releases the bytes of all puts before it, which this thread copied, be it the progress
  // thread or a caller that puts to its own rank. Pairs with the acquire of whoever awaits the
  // word.
  protocol::store_release(reinterpret_cast<std::uint64_t*>(base() + word.offset), word.value);
}

void UcxHeap::send(Peer& peer, Header header, const void* data, std::size_t bytes) {
  if (peer.lost.load(std::memory_order_relaxed))
    throw Error(ErrorCode::kPeerFailed, fmt::format("rank {}: {}", peer.rank, peer.reason),
                {peer.rank});
  if (free_sendings_.empty()) {
    free_sendings_.push_back(&sendings_.emplace_back());
    free_sendings_.reserve(sendings_.size());  // so that giving one back needs no memory
  }
  Sending& sending = *free_sendings_.back();
  free_sendings_.pop_back();
  header.number = peer.sent++;
  sending = {&peer, header};
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = &UcxHeap::on_sent;
  param.user_data = &sending;
  const ucs_status_ptr_t request =
      ucp_am_send_nbx(peer.endpoint, 0, &sending.header, sizeof(Header), data, bytes, &param);
  if (UCS_PTR_IS_PTR(request)) {
    wake();
    return;
  }
  complete(sending, UCS_PTR_STATUS(request));
  if (request != nullptr)
    throw Error(ErrorCode::kPeerFailed, fmt::format("rank {}: {}", peer.rank, peer.reason),
                {peer.rank});
}

void UcxHeap::complete(Sending& sending, ucs_status_t status) {
  Peer& peer = *sending.peer;
  peer.completed.add(sending.header.number);
  free_sendings_.push_back(&sending);
  advanced_ = true;
  if (status != UCS_OK) lose(peer, ucs_status_string(status));
}

bool UcxHeap::flush(int rank, std::chrono::milliseconds timeout) {
  check_rank(rank);
  if (rank == rank_) return true;
  auto lock = turnstile_.enter();
  const Peer& peer = peers_[rank];
  // Those of other threads are waited for as well, which does no harm.
  const std::uint64_t until = peer.sent;
  const auto done = [&] { return peer.completed.next() >= until; };
  // A lost rank's messages come to an end too: UCX gives them up when its endpoint is closed.
  const bool in_time = done() || changed_.wait_for(lock, timeout, done);
  if (peer.lost.load(std::memory_order_relaxed))
    throw Error(ErrorCode::kPeerFailed, fmt::format("rank {}: {}", rank, peer.reason), {rank});
  return in_time;
}

bool UcxHeap::lost(int rank) const noexcept {
  return rank >= 0 && rank < static_cast<int>(peers_.size()) &&
         peers_[rank].lost.load(std::memory_order_acquire);
}

TransportCounts UcxHeap::counts() const noexcept {
  return {num_puts_.load(std::memory_order_relaxed), num_put_bytes_.load(std::memory_order_relaxed),
          num_signals_.load(std::memory_order_relaxed)};
}

}  // namespace deep_ep::fabric::ucx
