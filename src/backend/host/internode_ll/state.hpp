#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "backend/host/context.hpp"
#include "backend/host/internode_ll/routing.hpp"
#include "deep_ep/error.hpp"
#include "plan/low_latency.hpp"

namespace deep_ep::host::internode_ll {

/// What the low-latency calls of a rank share: everyone's memory, the tickets, and which ranks are
/// left out. One call at a time uses it; its threads only read it and wait.
class State {
 public:
  State(Context& context, const BackendOptions& options);
  /// Once the peers' memory is mapped.
  void open();

  Context& context() { return context_; }
  int rank() const { return context_.rank(); }
  int num_ranks() const { return context_.num_ranks(); }

  std::uint64_t take_ticket(plan::LowLatencyKind kind) { return tickets_[index(kind)]++; }
  /// At `rank`.
  plan::LowLatencyPlaces places(int rank, plan::LowLatencyKind kind, std::uint64_t ticket,
                                const plan::LowLatencyShape& shape) const {
    return layouts_[rank].places(kind, ticket, shape);
  }

  /// Waits until every rank has read what the ticket before the last put into the same memory.
  void wait_consumed(const Call& call, plan::LowLatencyKind kind, std::uint64_t ticket);
  /// This rank has read all of the ticket.
  void publish_consumed(plan::LowLatencyKind kind, std::uint64_t ticket);

  bool masked(int rank) const { return masked_[rank].load(std::memory_order_relaxed) != 0; }
  void mask(int rank, bool masked) {
    masked_[rank].store(masked ? 1 : 0, std::memory_order_relaxed);
  }

  /// As Context::wait, but with enable_shrink ranks that do not come are masked, and the wait goes
  /// on: ready() and missing() leave masked ranks out.
  template <class Ready, class ListMissing>
  void wait(const Call& call, const char* what, Ready&& ready, ListMissing&& missing) {
    for (;;) {
      try {
        return context_.wait(call, what, ready, missing);
      } catch (const Error& error) {
        if (!mask_missing(error, missing())) throw;
      }
    }
  }

  // Kept from call to call, so that a call allocates nothing.
  Routing routing;
  /// A row that a thread quantises.
  std::vector<std::byte>& scratch(int thread) { return scratch_[thread]; }

 private:
  static int index(plan::LowLatencyKind kind) { return static_cast<int>(kind); }
  bool mask_missing(const Error& error, const std::vector<Missing>& missing);
  void scrub(plan::LowLatencyKind kind, std::uint64_t ticket);

  Context& context_;
  std::int64_t bytes_;
  bool enable_shrink_;
  std::vector<plan::LowLatencyLayout> layouts_;  // by rank
  std::uint64_t first_ticket_;
  std::uint64_t tickets_[2];
  std::vector<std::atomic<int>> masked_;  // by rank
  std::vector<std::vector<std::byte>> scratch_;
};

}  // namespace deep_ep::host::internode_ll
