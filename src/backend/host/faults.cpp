#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <thread>

#include "backend/host/context.hpp"
#include "base/error.hpp"
#include "base/log.hpp"

// How a rank learns that something went wrong, and how it tells the others.
namespace deep_ep::host {

namespace {

std::string list_ranks(const std::vector<int>& ranks) {
  return fmt::format("rank{} {}", ranks.size() == 1 ? "" : "s", fmt::join(ranks, ", "));
}

// "waited for its rows: rank 3 expected 7, seen 6"
std::string describe(const char* what, const std::vector<Missing>& missing) {
  std::string text = fmt::format("waited for {}", what);
  const char* separator = ": ";
  for (const Missing& one : missing) {
    text +=
        fmt::format("{}rank {} expected {}, seen {}", separator, one.rank, one.expected, one.seen);
    separator = "; ";
  }
  return text;
}

}  // namespace

void fill_record(protocol::FaultRecord& record, const Error& error, int origin) {
  record.code = static_cast<std::uint32_t>(error.code());
  record.origin = origin;
  record.num_ranks = static_cast<std::int32_t>(
      std::min<std::size_t>(error.ranks().size(), protocol::FaultRecord::kMaxRanks));
  std::copy_n(error.ranks().begin(), record.num_ranks, record.ranks);
  std::strncpy(record.text, error.what(), protocol::FaultRecord::kTextBytes - 1);
}

void Context::peer_gone(int rank, bool orderly) {
  log::debug("rank {}: rank {} {}", global_rank(), global_rank(rank), orderly ? "left" : "died");
  // release, both: pairs with the acquire in gone() and in wait().
  gone_[rank].store(orderly ? kLeft : kDied, std::memory_order_release);
  num_gone_.fetch_add(1, std::memory_order_release);
  own_doorbell_->ring();
}

void Context::check_gone(const Call& call, const char* what, const std::vector<Missing>& missing) {
  for (const Missing& one : missing) {
    if (!gone(one.rank)) continue;
    const int local = local_rank(one.rank);
    // Whoever left because of a fault has told why, and before that: that is the news, not that it
    // left.
    if (network_ != nullptr) network_->poll();
    if (own().fault->load() != protocol::FaultRecord::kNone) return;
    int culprit = one.rank;
    std::string fate = local < 0               ? "cannot be reached any more"
                       : gone_[local] == kLeft ? "has destroyed its Buffer"
                                               : "has died";
    // Another node's rank may have given up because of one of this node, and not got that across.
    const auto died = std::find(gone_.begin(), gone_.end(), kDied);
    if (local < 0 && died != gone_.end()) {
      culprit = global_rank(static_cast<int>(died - gone_.begin()));
      fate = fmt::format("has died, and rank {} cannot be reached any more", one.rank);
    }
    throw Error(ErrorCode::kPeerFailed,
                fmt::format("{} (call {}) on rank {}: rank {} {}; {}", call.operation, call.epoch,
                            global_rank(), culprit, fate, describe(what, {one})),
                {culprit});
  }
}

void Context::announce_wait(const std::vector<Missing>& missing) {
  if (missing.empty()) return;
  const int rank = missing.front().rank;
  const std::uint64_t mark =
      protocol::wait_mark(rank, beat_.fetch_add(1, std::memory_order_relaxed));
  protocol::store_relaxed(own().wait_mark, mark);
  if (network_ == nullptr) return;
  // A signal to each rank of other nodes: seldom, however many threads wait, and for whom.
  constexpr std::int64_t kOtherRankNs = 2'000'000, kBeatNs = 50'000'000;
  const std::int64_t now = protocol::HostWaiter::now();
  const bool other = announced_.load(std::memory_order_relaxed) != rank;
  const std::int64_t since = now - told_at_.load(std::memory_order_relaxed);
  if (since < (other ? kOtherRankNs : kBeatNs)) return;
  announced_.store(rank, std::memory_order_relaxed);
  told_at_.store(now, std::memory_order_relaxed);
  network_->announce_wait(mark);
}

void Context::announce_end_of_wait() {
  protocol::store_relaxed(own().wait_mark, std::uint64_t{0});
  announced_.store(-1, std::memory_order_relaxed);
  if (network_ != nullptr) network_->announce_wait(0);
}

std::uint64_t Context::wait_mark(int global_rank) {
  const int local = local_rank(global_rank);
  if (local >= 0) return protocol::load_relaxed(peer(local).wait_mark);
  return network_ == nullptr ? 0 : network_->wait_mark(global_rank);
}

bool Context::gone(int global_rank) const {
  const int local = local_rank(global_rank);
  if (local >= 0) return gone_[local].load(std::memory_order_acquire) != kHere;
  return network_ != nullptr && network_->lost(global_rank);
}

bool Context::any_gone(const std::vector<Missing>& missing) const {
  return std::any_of(missing.begin(), missing.end(),
                     [this](const Missing& one) { return gone(one.rank); });
}

std::vector<int> Context::find_culprits(const std::vector<Missing>& missing) {
  std::set<int> culprits;
  for (const Missing& one : missing) {
    std::vector<int> path;
    int at = one.rank;
    // Ends at a rank that waits for nobody, or comes round: then all of the round are suspect but
    // this rank.
    while (std::find(path.begin(), path.end(), at) == path.end()) {
      path.push_back(at);
      const int next = protocol::awaited_rank(wait_mark(at));
      if (next < 0 || next >= topology_.num_ranks) break;
      at = next;
    }
    culprits.insert(std::find(path.begin(), path.end(), at), path.end());
  }
  culprits.erase(global_rank());
  if (culprits.empty()) {
    for (const Missing& one : missing) culprits.insert(one.rank);
  }
  return {culprits.begin(), culprits.end()};
}

void Context::throw_unready(const Call& call, const char* what,
                            const std::vector<Missing>& missing) {
  // Also when the wait expired: a fault record that nobody finished writing ends it early.
  if (std::optional<Error> known = fault(call.operation)) {
    throw Error(known->code(), fmt::format("{}; {}", known->what(), describe(what, missing)),
                known->ranks());
  }
  protocol::schedule_point(protocol::Point::kWait);
  const std::vector<int> culprits = find_culprits(missing);
  throw Error(ErrorCode::kTimeout,
              fmt::format("{} (call {}) on rank {}: {} did not arrive within {} ms; {}",
                          call.operation, call.epoch, global_rank(), list_ranks(culprits),
                          call.timeout.count(), describe(what, missing)),
              culprits);
}

void Context::check_fault(const Call& call) {
  if (std::optional<Error> known = fault(call.operation)) throw Error(*known);
}

void Context::throw_unreadable(const Call& call, int rank, const std::string& error) {
  // A process loses its memory some time before its sockets close.
  constexpr std::chrono::seconds kGrace(1);
  const auto end =
      std::chrono::steady_clock::now() + std::min<std::chrono::nanoseconds>(kGrace, call.timeout);
  const protocol::EpochFlag& posted = mailbox_of(rank_, call).posted[rank];
  wait(
      call, "its rows", [&] { return std::chrono::steady_clock::now() >= end; },
      [&] {
        return std::vector<Missing>{{global_rank(rank), call.epoch, posted.seen()}};
      });
  throw Error(ErrorCode::kPeerFailed,
              fmt::format("{} (call {}) on rank {}: the rows of rank {} cannot be read: {}",
                          call.operation, call.epoch, global_rank(), global_rank(rank), error),
              {global_rank(rank)});
}

void Context::raise_fault(const Error& error) noexcept {
  for (int i = 0; i < static_cast<int>(control_.size()); ++i) {
    protocol::FaultRecord& record = *peer(i).fault;
    if (!record.claim()) continue;
    fill_record(record, error, global_rank());
    record.publish();
    ring_doorbell(i);
  }
  if (network_ != nullptr) network_->raise_fault(error);
}

std::optional<Error> Context::fault(const char* operation) {
  if (control_.empty()) return std::nullopt;
  if (network_ != nullptr) network_->poll();
  const protocol::FaultRecord& record = *own().fault;
  std::uint32_t state = record.load();
  if (state == protocol::FaultRecord::kNone) return std::nullopt;
  // Its writer needs microseconds, unless it died on the way.
  for (int i = 0; i < 1000 && state == protocol::FaultRecord::kClaimed; ++i) {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    state = record.load();
  }
  if (state == protocol::FaultRecord::kClaimed) {
    return Error(ErrorCode::kPeerFailed,
                 fmt::format("{} on rank {}: another rank failed and died before it said why",
                             operation, global_rank()));
  }
  std::vector<int> ranks(record.ranks, record.ranks + record.num_ranks);
  auto code = static_cast<ErrorCode>(record.code);
  if (record.origin == global_rank()) return Error(code, record.text, std::move(ranks));
  // Another rank's invalid argument is not this caller's.
  if (code == ErrorCode::kInvalidArgument) code = ErrorCode::kPeerFailed;
  if (ranks.empty()) ranks.push_back(record.origin);
  return Error(code,
               fmt::format("{} on rank {}: rank {} reported: {}", operation, global_rank(),
                           record.origin, record.text),
               std::move(ranks));
}

}  // namespace deep_ep::host
