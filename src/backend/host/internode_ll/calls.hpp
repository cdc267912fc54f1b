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

/// Where what one rank is sent is written: there, or, for a rank of another node, in the mirror.
struct Outbox {
  const plan::LowLatencyPlaces& places;
  int index;

  plan::Packet* call() const { return places.call(index); }
  plan::Packet* counts() const { return places.count(index); }
  plan::Packet* head(std::int64_t message) const { return places.messages.head(index, message); }
  std::byte* row(std::int64_t message) const { return places.messages.plain_row(index, message); }
  plan::Packet* return_head(std::int64_t message) const {
    return places.returns.head(index, message);
  }
  std::byte* return_row(std::int64_t message) const {
    return places.returns.plain_row(index, message);
  }
};

/// One step of a call: its ticket, its places, and the packets that go ahead of its messages, which
/// a source writes last, so that on hosts they stand for all that it sends.
///
/// Ranks of other nodes get the same as those of this one: what was written to the mirror is put to
/// the same places there, then a word tells them. One thread does both, the step's.
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
  Outbox to(int rank) const { return {places_[rank], state_.index_at(rank)}; }
  /// Of this rank, by source.
  const plan::LowLatencyPlaces& own() const { return places_[state_.rank()]; }

  /// Messages that were written ahead of the call, and their counts: nothing where they are
  /// already.
  void put_messages(int rank, std::int64_t num_messages);
  /// release: all that this thread, and those that it has joined, wrote or put to `rank` before.
  void publish_call(int rank, std::int32_t num_messages);
  /// Behind the call. Inside the node each sum's head has told it, and this wakes the rank.
  void publish_returns(int rank, std::int64_t num_returns);
  /// Waits for the calls of all ranks, and compares them with this rank's. An acquire of each.
  void wait_calls();
  const SourceCall& call_of(int source) const { return calls_[source]; }
  /// How many of the `expected` sums of `rank` are here, where `known` are. An acquire of each.
  std::int32_t count_returns(int rank, std::int32_t known, std::int32_t expected) const;

  /// Waited for `rank` until now, beginning with the last start_waiting().
  void start_waiting() { waiting_since_ = std::chrono::steady_clock::now(); }
  void arrived(int rank);
  void finish() { state_.publish_consumed(kind_, ticket_); }

 private:
  void find_places();
  bool call_is_here(int source) const;
  /// What lies in the mirror, to a remote rank's place of the same name.
  void put_area(int rank, plan::MessageArea plan::LowLatencyPlaces::*area,
                std::int64_t num_messages);
  template <class T>
  void put_part(int rank, const T* place, const T* mirror, std::int64_t count) {
    if (count > 0) state_.put(rank, place, mirror, count * static_cast<std::int64_t>(sizeof(T)));
  }
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
