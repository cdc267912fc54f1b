#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/host/context.hpp"
#include "backend/host/internode/rail.hpp"
#include "deep_ep/bootstrap.hpp"
#include "fabric/symmetric_heap.hpp"
#include "plan/internode.hpp"
#include "protocol/rail.hpp"

namespace deep_ep::host::internode {

/// What a rank tells the others of a call ahead of it.
struct Announcement {
  std::vector<std::int32_t> rows;                   // [R] for each rank
  const std::int32_t* tokens_per_expert = nullptr;  // [E] or null
  const std::int32_t* send_rdma_head = nullptr;     // [N, nodes]; null: no tokens
};

/// What the calls between nodes of a rank share: its part of the symmetric heap, the rings to its
/// rail peers, and what the ranks have said of the present call. Nodes are counted over all, ranks
/// as well unless it says "local".
class State final : public Network {
 public:
  State(Context& context, const BackendOptions& options);

  /// Collective: makes the symmetric heap, with at least `bytes` bytes for rails and, if asked for,
  /// a part for low latency; then the ranks of a node map each other's.
  void alloc(Bootstrap& bootstrap, std::int64_t bytes, const BackendOptions& options);
  /// The others find this rank gone.
  void free() noexcept;
  bool open() const { return heap_ != nullptr; }

  Context& context() { return context_; }
  const plan::Topology& topology() const { return context_.topology(); }
  int rank() const { return context_.global_rank(); }
  int node() const { return topology().node_of(rank()); }
  int num_lanes() const { return shape_.num_lanes; }
  fabric::SymmetricHeap& heap() { return *heap_; }
  const fabric::SymmetricHeap& heap() const { return *heap_; }
  /// Low latency's part of the heap of a rank of this node, once that is mapped here.
  std::byte* low_latency_part(int local) {
    return context_.fabric().base(local, segment_) + protocol::RailBlock::bytes(shape_);
  }

  // To a rank of another node; `at` is a place in this rank's heap, for the same place in the other
  // one's. A lost rank gets nothing, and need not be named here: who waits for it does that.
  void put(int rank, const void* at, const void* source, std::int64_t bytes);
  /// release: pairs with an acquire of the word there; see fabric::SymmetricHeap.
  void signal(int rank, const void* word, std::uint64_t value);
  /// What was put to `rank` may be written again; false if it is lost. Others see meanwhile that
  /// this rank waits for it. Throws Error(kTimeout), and that of a fault.
  bool flush(const Call& call, int rank, std::chrono::milliseconds timeout);

  RailSender& rail_to(int lane, int node) { return senders_[lane * num_peers() + peer_of(node)]; }
  RailReceiver& rail_from(int lane, int node) {
    return receivers_[lane * num_peers() + peer_of(node)];
  }

  /// Tells the rail peers, waits for what they say, compares the records, and passes on to the
  /// ranks of this node what they need of it. wait_stats: += [R], ns, or null.
  void announce(const Call& call, const Announcement& own, std::int64_t* wait_stats = nullptr);
  /// Waits until the ranks of this node have announced the call. Behind it, of all tokens for ranks
  /// of this node:
  void wait_announced(const Call& call, std::int64_t* wait_stats = nullptr);
  /// Rows from `source` for the local rank, [begin, end) among those that it receives.
  plan::RowRange rows(int source, int local) const {
    const std::int32_t* prefix = prefix_.data() + std::int64_t{local} * topology().num_ranks;
    return plan::part_of(prefix, source);
  }
  std::int64_t received_rows(int local) const { return rows(topology().num_ranks - 1, local).end; }
  /// What the rank's own tensor recv_gbl_rank_prefix_sum holds.
  const std::int32_t* prefix_sum(int local) const {
    return prefix_.data() + std::int64_t{local} * topology().num_ranks;
  }
  /// Tokens of a source.
  std::int64_t num_tokens(const Call& call, int source);
  /// Entries for this rank's expert `expert` of all sources.
  std::int64_t tokens_of_expert(const Call& call, int expert);
  /// Behind announce(): records from `node` (of the rank with this rank's index there) in `lane`.
  plan::RowRange records(int node, int lane) const {
    const auto& lanes = lane_records_[node];
    return {lanes[lane], lanes[lane + 1]};
  }
  std::int64_t num_records(int node) const { return lane_records_[node][num_lanes()]; }

  /// Rows and bytes of rows that this rank has given to the network.
  void count_rows(std::int64_t rows, std::int64_t bytes) {
    rows_sent_.fetch_add(rows, std::memory_order_relaxed);
    bytes_sent_.fetch_add(bytes, std::memory_order_relaxed);
  }
  NetworkCounts counts() const;

  bool poll() override;
  bool lost(int rank) const override;
  std::uint64_t wait_mark(int rank) const override;
  void announce_wait(std::uint64_t mark) noexcept override;
  void raise_fault(const Error& error) noexcept override;

 private:
  int num_peers() const { return topology().num_nodes() - 1; }
  /// Index of another node among all others of `at_node`.
  static int peer_index(int node, int at_node) { return node < at_node ? node : node - 1; }
  int peer_of(int node) const { return peer_index(node, this->node()); }
  std::int64_t offset(const void* part) const {
    return static_cast<const std::byte*>(part) - heap_->base();
  }
  std::shared_ptr<fabric::Mapping> make_mapped_memory(Bootstrap& bootstrap, std::int64_t bytes);
  void make_rings();
  void post_rails(const Call& call, const Announcement& own);
  void wait_rails(const Call& call, std::int64_t* wait_stats);
  const protocol::RailMessage& message_from(const Call& call, int node) const;
  const std::int32_t* experts_from(const Call& call, int node) const;
  void tell_node(const Call& call, const Announcement& own);
  void adopt(const protocol::FaultRecord& record);
  template <class Body>
  void for_remote_ranks(Body&& body) {
    for (int rank = 0; rank < topology().num_ranks; ++rank)
      if (topology().node_of(rank) != node()) body(rank);
  }

  Context& context_;
  std::unique_ptr<fabric::SymmetricHeap> heap_;
  bool one_process_;
  int segment_ = -1;  // that is the heap's memory; -1: nobody else maps that
  protocol::RailShape shape_;
  protocol::RailBlock block_{};
  std::vector<RailSender> senders_;                      // [lanes, peers]
  std::vector<RailReceiver> receivers_;                  // [lanes, peers]
  std::vector<std::vector<std::int32_t>> lane_records_;  // by node: [lanes + 1]
  std::vector<std::int32_t> prefix_;                     // [local ranks, R]
  std::atomic<bool> told_fault_{false};
  std::atomic<std::int64_t> rows_sent_{0};
  std::atomic<std::int64_t> bytes_sent_{0};
};

}  // namespace deep_ep::host::internode
