#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "backend/host/context.hpp"
#include "backend/host/internode/state.hpp"
#include "backend/host/internode_ll/routing.hpp"
#include "deep_ep/error.hpp"
#include "plan/low_latency.hpp"

namespace deep_ep::host::internode_ll {

/// What the low-latency calls of a rank share: everyone's memory, the tickets, and which ranks are
/// left out. One call at a time uses it; its threads only read it and wait. Ranks are those of all
/// nodes.
class State {
 public:
  State(Context& context, const BackendOptions& options);
  /// Once the peers' memory is mapped: of a Buffer of one node, or of several, whose memory is a
  /// part of the symmetric heap.
  void open();
  void open(internode::State& network);

  Context& context() { return context_; }
  int rank() const { return context_.global_rank(); }
  int num_ranks() const { return context_.topology().num_ranks; }
  /// Of another node: what this rank sends it is composed in a mirror and put from there.
  bool remote(int rank) const {
    return context_.topology().node_of(rank) != context_.topology().node_of(this->rank());
  }
  /// All ranks, those with the longest way first, then those after this one; this one last.
  const std::vector<int>& order_of_sending() const { return order_of_sending_; }
  void ring_doorbell(int rank) {
    if (!remote(rank)) context_.ring_doorbell(context_.topology().index_of(rank));
  }

  std::uint64_t take_ticket(plan::LowLatencyKind kind) { return tickets_[index(kind)]++; }
  /// Where this rank writes what it sends to `rank`: there, or, if that is remote, in the mirror.
  plan::LowLatencyPlaces places(int rank, plan::LowLatencyKind kind, std::uint64_t ticket,
                                const plan::LowLatencyShape& shape) const {
    return layouts_[rank].places(kind, ticket, shape);
  }
  /// Under whose index it does so: as this source's, or in the mirror as that receiver's.
  int index_at(int rank) const { return remote(rank) ? rank : this->rank(); }

  /// Waits until every rank has read what the ticket before the last put into the same memory
  /// (I13), and the mirror of that may be written.
  void wait_consumed(const Call& call, plan::LowLatencyKind kind, std::uint64_t ticket);
  /// This rank has read all of the ticket.
  void publish_consumed(plan::LowLatencyKind kind, std::uint64_t ticket);

  /// To a remote rank, in this order: bytes of the mirror to a place that is named as it is called
  /// in this rank's own memory, then the word that tells them.
  void put(int rank, const void* at, const void* mirror, std::int64_t bytes) {
    network_->put(rank, at, mirror, bytes);
  }
  void count_rows(std::int64_t rows, std::int64_t bytes) { network_->count_rows(rows, bytes); }
  void signal_arrived(int rank, plan::LowLatencyKind kind, std::uint64_t ticket,
                      std::uint64_t arrived) {
    // release: pairs with has_arrived() there.
    network_->signal(rank, &own().arrived_from(kind, ticket, this->rank()).value, arrived);
  }
  /// acquire: pairs with signal_arrived() of the remote rank `source`.
  bool has_arrived(int source, plan::LowLatencyKind kind, std::uint64_t ticket,
                   std::uint64_t arrived) const {
    return own().arrived_from(kind, ticket, source).reached(arrived);
  }

  bool masked(int rank) const { return masked_[rank].load(std::memory_order_relaxed) != 0; }
  void mask(int rank, bool masked) {
    masked_[rank].store(masked ? 1 : 0, std::memory_order_relaxed);
  }

  /// As Context::wait, but with enable_shrink ranks that do not come are masked, and the wait goes
  /// on: ready() and missing() leave masked ranks out. Whoever shows after the timeout that it
  /// waits itself is waited for again, a few times.
  template <class Ready, class ListMissing>
  void wait(const Call& call, const char* what, Ready&& ready, ListMissing&& missing) {
    try {
      context_.wait(call, what, ready, missing);
    } catch (const Error& error) {
      if (!is_absence(error)) throw;
      wait_without(
          call, error, [&](const Call& again) { context_.wait(again, what, ready, missing); },
          missing);
    }
  }

  // Kept from call to call, so that a call allocates nothing.
  Routing routing;
  /// A row that a thread quantises.
  std::vector<std::byte>& scratch(int thread) { return scratch_[thread]; }

 private:
  static int index(plan::LowLatencyKind kind) { return static_cast<int>(kind); }
  const plan::LowLatencyLayout& own() const { return layouts_[rank()]; }
  void carve(int rank, std::byte* memory) {
    layouts_[rank] = plan::LowLatencyLayout::carve(memory, bytes_, num_ranks());
  }
  void reclaim_mirror(const Call& call);
  bool is_absence(const Error& error);
  void wait_without(const Call& call, Error error, const std::function<void(const Call&)>& wait,
                    const std::function<std::vector<Missing>()>& missing);
  void mask_all(const std::vector<int>& ranks, const Error& error);
  void scrub(plan::LowLatencyKind kind, std::uint64_t ticket);

  Context& context_;
  internode::State* network_ = nullptr;  // while there are several nodes
  std::int64_t bytes_;
  bool enable_shrink_;
  std::vector<plan::LowLatencyLayout> layouts_;  // by rank; the mirror's for remote ones
  std::vector<int> order_of_sending_;
  std::uint64_t first_ticket_;
  std::uint64_t tickets_[2];
  std::vector<std::atomic<int>> masked_;  // by rank
  std::vector<std::vector<std::byte>> scratch_;
};

}  // namespace deep_ep::host::internode_ll
