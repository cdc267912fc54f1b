#include <fmt/ranges.h>
#include <poll.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.hpp"
#include "base/library_thread.hpp"
#include "base/log.hpp"
#include "fabric/ucx/heap.hpp"

namespace deep_ep::fabric::ucx {
namespace {

using Clock = std::chrono::steady_clock;

/// How long destruction tries to hand over what is under way, and again to close endpoints.
constexpr std::chrono::milliseconds kLinger{1000};
/// How long a rank that leaves after a fault stays at most, for others to get what it told them.
constexpr std::chrono::milliseconds kLastWords{750};
/// The offset of no word: in its turn a last word comes out of Arrivals as such a signal.
constexpr std::uint64_t kNoWord = UINT64_MAX;
/// UCX looks at its own timers, such as those of keep-alives, when it is called.
constexpr int kSleepMs = 500;

}  // namespace

void UcxHeap::make_endpoints(const std::vector<std::string>& addresses) {
  for (Peer& peer : peers_) {
    if (peer.rank == rank_) continue;
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(addresses[peer.rank].data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler = {.cb = &UcxHeap::on_error, .arg = &peer};
    check(ucp_ep_create(worker_.get(), &params, &peer.endpoint),
          fmt::format("ucp_ep_create for rank {}, by TCP or another transport that reports lost "
                      "peers (UCX_TLS, UCX_NET_DEVICES)",
                      peer.rank));
  }
}

void UcxHeap::start() {
  const auto lock = turnstile_.enter();
  thread_ = start_library_thread([this] { run(); });
}

void UcxHeap::greet_all() {
  auto lock = turnstile_.enter();
  for (Peer& peer : peers_) {
    if (peer.rank != rank_) send(peer, {.source = rank_, .kind = Kind::kHello}, nullptr, 0);
  }
  std::vector<int> missing;
  std::vector<int> lost;
  const auto all_heard = [&] {
    missing.clear();
    lost.clear();
    for (const Peer& peer : peers_) {
      if (peer.rank != rank_ && !peer.heard) missing.push_back(peer.rank);
      if (peer.lost.load(std::memory_order_relaxed)) lost.push_back(peer.rank);
    }
    return missing.empty() || !lost.empty();
  };
  changed_.wait_for(lock, options_.timeout, all_heard);
  if (!lost.empty()) {
    throw Error(ErrorCode::kPeerFailed,
                fmt::format("symmetric heap: rank {} reaches rank {} no more: {}", rank_,
                            fmt::join(lost, ", "), peers_[lost.front()].reason),
                lost);
  }
  if (!missing.empty()) {
    throw Error(ErrorCode::kTimeout,
                fmt::format("symmetric heap: rank {} has heard nothing from rank {} for {} ms over "
                            "UCX (UCX_TLS, UCX_NET_DEVICES say which ways it may take)",
                            rank_, fmt::join(missing, ", "), options_.timeout.count()),
                missing);
  }
}

void UcxHeap::run() {
  auto lock = turnstile_.enter();
  while (!stop_) {
    const bool moved = ucp_worker_progress(worker_.get()) != 0;
    attend();
    tell();
    if (!moved && ucp_worker_arm(worker_.get()) != UCS_ERR_BUSY) {
      asleep_ = true;
      lock.unlock();
      pollfd event{.fd = event_fd_, .events = POLLIN};
      poll(&event, 1, kSleepMs);
      lock = turnstile_.enter();
      asleep_ = false;
    } else {
      lock.unlock();
      lock = turnstile_.enter();
    }
  }
}

void UcxHeap::tell() {
  if (std::exchange(advanced_, false)) changed_.notify_all();
  if (std::exchange(signaled_, false) && options_.on_signal) options_.on_signal();
}

void UcxHeap::wake() {
  if (std::exchange(asleep_, false)) ucp_worker_signal(worker_.get());
}

void UcxHeap::lose(Peer& peer, std::string reason) {
  if (peer.lost.load(std::memory_order_relaxed)) return;
  peer.reason = std::move(reason);
  log::info("symmetric heap: rank {} has lost rank {}: {}", rank_, peer.rank, peer.reason);
  peer.lost.store(true, std::memory_order_release);
  to_close_.push_back(&peer);
  advanced_ = signaled_ = true;
  wake();
}

// What may not be done from within UCX's calls of us.
void UcxHeap::attend() {
  answer();
  close_lost();
}

void UcxHeap::close_lost() {
  for (Peer* peer : std::exchange(to_close_, {})) close(*peer);
}

void UcxHeap::answer() {
  for (Peer* peer : std::exchange(to_answer_, {})) {
    try {
      send(*peer, {.source = rank_, .kind = Kind::kHeard}, nullptr, 0);
    } catch (const Error&) {  // it is lost
    }
  }
}

void UcxHeap::close(Peer& peer) {
  ucp_ep_h endpoint = std::exchange(peer.endpoint, nullptr);
  if (endpoint == nullptr) return;
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  param.cb.send = &UcxHeap::on_closed;
  param.user_data = &pending_;
  if (UCS_PTR_IS_PTR(ucp_ep_close_nbx(endpoint, &param))) ++pending_;
}

bool UcxHeap::receive(const Header& header, const void* data, std::size_t bytes) {
  Peer& peer = peers_[header.source];
  const auto set_word = [&](const Word& word) {
    if (word.offset == kNoWord) {
      to_answer_.push_back(&peer);
      return;
    }
    set(word);
    signaled_ = true;
  };
  const auto heap_bytes = static_cast<std::uint64_t>(options_.bytes);
  const std::uint64_t length = header.kind == Kind::kSignal ? sizeof(std::uint64_t) : bytes;
  if (length > heap_bytes || header.offset > heap_bytes - length) return false;
  switch (header.kind) {
    case Kind::kHello:
      peer.heard = advanced_ = true;
      peer.arrivals.put(header.number, set_word);
      return true;
    case Kind::kPut:
      std::memcpy(base() + header.offset, data, bytes);
      peer.arrivals.put(header.number, set_word);
      return true;
    case Kind::kSignal:
      if (header.offset % sizeof(std::uint64_t) != 0) return false;
      peer.arrivals.signal(header.number, {header.offset, header.value}, set_word);
      return true;
    case Kind::kLastWord:
      peer.arrivals.signal(header.number, {kNoWord, 0}, set_word);
      return true;
    case Kind::kHeard:
      peer.knows = true;
      peer.arrivals.put(header.number, set_word);
      return true;
  }
  return false;
}

ucs_status_t UcxHeap::on_message(void* heap, const void* header, std::size_t header_bytes,
                                 void* data, std::size_t bytes,
                                 const ucp_am_recv_param_t* param) noexcept {
  auto& self = *static_cast<UcxHeap*>(heap);
  Header copy;
  if (header_bytes != sizeof(copy)) return UCS_OK;  // not from a heap
  std::memcpy(&copy, header, sizeof(copy));
  if (copy.source < 0 || copy.source >= static_cast<int>(self.peers_.size())) return UCS_OK;
  const bool whole = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  if (!whole || !self.receive(copy, data, bytes))
    self.lose(self.peers_[copy.source], "it sent a message that is not of this version");
  return UCS_OK;
}

void UcxHeap::on_sent(void* request, ucs_status_t status, void* sending) noexcept {
  ucp_request_free(request);
  auto& sent = *static_cast<Sending*>(sending);
  sent.peer->heap->complete(sent, status);
}

void UcxHeap::on_closed(void* request, ucs_status_t /*status*/, void* pending) noexcept {
  ucp_request_free(request);
  --*static_cast<int*>(pending);
}

void UcxHeap::on_error(void* peer, ucp_ep_h /*endpoint*/, ucs_status_t status) noexcept {
  auto& lost = *static_cast<Peer*>(peer);
  lost.heap->lose(lost, ucs_status_string(status));
}

template <class Ready>
bool UcxHeap::progress_until(Clock::time_point deadline, Ready&& ready) {
  while (!ready()) {
    if (Clock::now() > deadline) return false;
    if (ucp_worker_progress(worker_.get()) == 0)
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    attend();
  }
  return true;
}

void UcxHeap::flush_all() {
  for (Peer& peer : peers_) {
    if (peer.endpoint == nullptr) continue;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.cb.send = &UcxHeap::on_closed;
    param.user_data = &pending_;
    if (UCS_PTR_IS_PTR(ucp_ep_flush_nbx(peer.endpoint, &param))) ++pending_;
  }
}

// Flushed is not read: a connection that is closed too soon takes along what said why.
void UcxHeap::say_last_words() {
  for (Peer& peer : peers_) {
    if (peer.endpoint == nullptr || peer.lost.load(std::memory_order_relaxed)) continue;
    try {
      send(peer, {.source = rank_, .kind = Kind::kLastWord}, nullptr, 0);
    } catch (const Error&) {  // it is lost
    }
  }
  progress_until(Clock::now() + kLastWords, [this] {
    return std::all_of(peers_.begin(), peers_.end(), [](const Peer& peer) {
      return peer.knows || peer.endpoint == nullptr || peer.lost.load(std::memory_order_relaxed);
    });
  });
}

UcxHeap::~UcxHeap() {
  auto lock = turnstile_.enter();
  stop_ = true;
  wake();
  lock.unlock();
  if (thread_.joinable()) thread_.join();
  // A last signal, say, which its sender does not wait for, is still to arrive.
  flush_all();
  const auto none_pending = [this] { return pending_ == 0; };
  if (abandoned_) {
    say_last_words();
  } else {
    progress_until(Clock::now() + kLinger, none_pending);
  }
  for (Peer& peer : peers_) close(peer);
  progress_until(Clock::now() + kLinger, none_pending);
  worker_.reset();  // calls back for what is left, while peers_ and sendings_ are there
}

}  // namespace deep_ep::fabric::ucx
