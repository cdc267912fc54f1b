#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "backend/host/internode_ll/state.hpp"
#include "backend/params.hpp"

namespace deep_ep::host::internode_ll {

/// What a source's packets ahead of its messages say.
struct SourceCall {
  bool here = false;  // false: the source is masked, or was masked while it was waited for
  std::int32_t num_messages = 0;
};

/// One step of a call: its ticket, its places, and the packets that go ahead of its messages, which
/// a source writes last, so that on hosts they stand for all that it sends.
class Exchange {
 public:
  Exchange(State& state, plan::LowLatencyKind kind, const deep_ep::internode_ll::Step& step);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  /// Numbers the call, and waits until its memory is free.
  void begin_send();
  /// Of a step that only receives.
  void find_ticket();
  std::uint32_t tag() const { return plan::packet_tag(kind_, ticket_); }
  const plan::LowLatencyPlaces& at(int rank) const { return places_[rank]; }

  /// release: all that this thread, and those that it has joined, wrote to `rank` before.
  void publish_call(int rank, std::int32_t num_messages);
  /// Waits for the calls of all ranks, and compares them with this rank's. An acquire of each.
  void wait_calls();
  const SourceCall& call_of(int source) const { return calls_[source]; }
  /// Of a rank that was masked behind its call.
  void leave_out(int source) { calls_[source] = {}; }

  /// Waited for `rank` until now, beginning with the last start_waiting().
  void start_waiting() { waiting_since_ = std::chrono::steady_clock::now(); }
  void arrived(int rank);
  void finish() { state_.publish_consumed(kind_, ticket_); }

 private:
  void find_places();
  bool call_is_here(int source) const;
  void check_agreement(int source);

  State& state_;
  plan::LowLatencyKind kind_;
  const deep_ep::internode_ll::Step& step_;
  std::uint64_t ticket_ = 0;
  std::vector<plan::LowLatencyPlaces> places_;  // by rank
  std::vector<SourceCall> calls_;               // by rank
  std::vector<std::int64_t> longest_wait_;      // by rank, ns; empty without statistics
  std::chrono::steady_clock::time_point waiting_since_;
};

}  // namespace deep_ep::host::internode_ll
