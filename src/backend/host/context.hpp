#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "backend/host/thread_pool.hpp"
#include "base/env.hpp"
#include "fabric/fabric.hpp"
#include "fabric/process_memory.hpp"
#include "plan/topology.hpp"
#include "protocol/barrier.hpp"
#include "protocol/control.hpp"
#include "protocol/host_waiter.hpp"
#include "protocol/ring.hpp"
#include "protocol/wait.hpp"

namespace deep_ep::host {

/// What the ranks of other nodes have to do with waits and faults. Ranks are those of all nodes.
class Network {
 public:
  virtual ~Network() = default;
  /// Looks at what has come: another node's fault becomes this rank's. True if ranks are lost.
  virtual bool poll() = 0;
  virtual bool lost(int rank) const = 0;
  /// Of a rank of another node; and to tell all of them this rank's.
  virtual std::uint64_t wait_mark(int rank) const = 0;
  virtual void announce_wait(std::uint64_t mark) noexcept = 0;
  /// Tells all ranks of other nodes.
  virtual void raise_fault(const Error& error) noexcept = 0;
};

/// A rank, counted over all nodes, that a wait still waits for.
struct Missing {
  int rank;
  std::uint64_t expected;
  std::uint64_t seen;
};

/// Everything of a fault record but its state. `origin` is counted over all nodes.
void fill_record(protocol::FaultRecord& record, const Error& error, int origin);

/// What the steps of a rank share: the control blocks of all ranks of its node, the rings, the
/// threads, and how to wait. Ranks are those of the node, unless it says otherwise.
class Context {
 public:
  explicit Context(const BackendOptions& options);

  int rank() const { return rank_; }
  int num_ranks() const { return num_ranks_; }
  const plan::Topology& topology() const { return topology_; }
  /// Counted over all nodes.
  int global_rank() const { return first_rank_ + rank_; }
  int global_rank(int rank) const { return first_rank_ + rank; }
  /// Of waits and faults, once there are other nodes to tell. Outlives this object's calls.
  void set_network(Network* network) { network_ = network; }
  int num_lanes() const { return num_lanes_; }
  fabric::Fabric& fabric() { return fabric_; }
  ThreadPool& pool() { return pool_; }
  static std::int64_t control_bytes(const plan::Topology& topology);

  std::string export_handles(std::int64_t heap_bytes);
  /// `exported` by the ranks of all nodes.
  void open_handles(const std::vector<std::string>& exported, std::chrono::milliseconds timeout);
  /// Why this rank cannot read its peers' memory; empty if it can. All ranks choose by all ranks'
  /// words whether combine pulls.
  std::string why_no_pull();
  void choose_path(const std::vector<std::string>& why_no_pull);
  bool pulls() const { return pulls_; }

  protocol::ControlBlock& own() { return control_[rank_]; }
  protocol::ControlBlock& peer(int rank) { return control_[rank]; }
  protocol::RingSender& ring_to(int lane, int rank) { return senders_[lane * num_ranks_ + rank]; }
  protocol::RingReceiver& ring_from(int lane, int rank) {
    return receivers_[lane * num_ranks_ + rank];
  }
  /// Something was published to `rank`.
  void ring_doorbell(int rank) { control_[rank].doorbell->ring(); }

  /// Memory of the peer's process, where combine pulls.
  const fabric::ProcessMemory& memory_of(int rank) const { return memory_[rank]; }
  /// What a thread of this rank reads rows into, where combine pulls. Kept for later calls.
  std::byte* scratch(int thread);
  std::int64_t scratch_bytes() const { return scratch_bytes_; }

  /// Ranks after this one first, so that not all start with the same peer; this rank is last.
  int peer_in_turn(int i) const { return (rank_ + 1 + i) % num_ranks_; }

  /// Where combine puts outputs of `rank` that are few, if combine pulls: memory that all map. Two
  /// of them alternate, as mailboxes do (I3).
  std::byte* staging(int rank, const Call& call) {
    return control_[rank].ring_data + (call.epoch % 2) * staging_bytes_;
  }
  std::int64_t staging_bytes() const { return staging_bytes_; }

  /// Where this rank's words of the call go in the mailbox of `rank`.
  protocol::Mailbox& mailbox_of(int rank, const Call& call) {
    return control_[rank].mailbox[call.epoch % 2];
  }
  /// Publishes this rank's record, and whatever was written to the mailboxes, to all ranks.
  void post(const Call& call);
  bool posted(const Call& call, int source);
  /// Throws Error(kDisagreement) if `source`, which has posted, called with something else.
  void check_agreement(const Call& call, int source);
  /// Waits until all ranks have posted, and checks each. wait_stats: += [R], ns, or null.
  void wait_posted(const Call& call, std::int64_t* wait_stats = nullptr);
  /// Waits until the flags of `ranks`, elements of flags[R], have reached the call's epoch: an
  /// acquire of each.
  void wait_flags(const Call& call, const char* what, const protocol::EpochFlag* flags,
                  std::vector<int> ranks, std::int64_t* wait_stats = nullptr);
  const std::vector<int>& all_ranks() const { return all_ranks_; }

  /// Returns when ready(), or throws the Error that names the operation, `what` it waited for, and
  /// who is missing().
  template <class Ready, class ListMissing>
  void wait(const Call& call, const char* what, Ready&& ready, ListMissing&& missing) {
    protocol::HostWaiter waiter(*own().doorbell, *own().fault, call.timeout, crowded_);
    bool announced = false;
    const protocol::WaitResult result = protocol::wait_until(waiter, [&] {
      // acquire: pairs with peer_gone(); what the peer published before it went is visible to
      // ready().
      const bool some_gone = num_gone_.load(std::memory_order_acquire) != 0;
      if (ready()) return true;
      // Once more behind it: what a rank sent before it was lost has come by then.
      const bool some_lost = network_ != nullptr && network_->poll();
      if (some_lost && ready()) return true;
      if ((some_gone || some_lost) && any_gone(missing())) {
        if (ready()) return true;  // it went behind the last look
        check_gone(call, what, missing());
      }
      if (waiter.waited() > kAnnounceAfter) {
        announce_wait(missing());
        announced = true;
      }
      return false;
    });
    // Whoever gives up stays marked: others may give up in the same moment and follow the marks.
    if (result != protocol::WaitResult::kReady) throw_unready(call, what, missing());
    if (announced) announce_end_of_wait();
  }

  /// For a wait of another kind: that it lasts, at least every 50 ms.
  void announce_wait(const std::vector<Missing>& missing);
  /// Its end; also for who goes on though a wait() threw.
  void announce_end_of_wait();
  /// Of a rank of any node, by protocol::wait_mark().
  std::uint64_t wait_mark(int global_rank);
  /// It died, left, or cannot be reached. acquire: pairs with peer_gone(); what the rank published
  /// before it went is visible.
  bool gone(int global_rank) const;

  /// Null while it is not mapped. Throws the Error for one that cannot be.
  std::byte* segment_base(const Call& call, int rank, int segment) const;

  /// Throws the Error of this Buffer's fault, if there is one.
  void check_fault(const Call& call);
  /// Throws the Error for memory of `rank` that could not be read: that it died or gave up, which
  /// is known a moment later, else `error`.
  [[noreturn]] void throw_unreadable(const Call& call, int rank, const std::string& error);

  void raise_fault(const Error& error) noexcept;
  std::optional<Error> fault(const char* operation);
  bool faulted() { return own().fault->load() != protocol::FaultRecord::kNone; }

 private:
  void open_fabric(const std::vector<std::string>& handles, std::chrono::milliseconds timeout);
  void peer_gone(int rank, bool orderly);
  // Long against any wait of ranks that work, short against any timeout.
  static constexpr std::chrono::milliseconds kAnnounceAfter{1};
  bool any_gone(const std::vector<Missing>& missing) const;
  /// Index in this node of a rank of any node, -1 for others.
  int local_rank(int global_rank) const {
    const int rank = global_rank - first_rank_;
    return rank >= 0 && rank < num_ranks_ ? rank : -1;
  }
  /// Who keeps the missing ranks from coming: follows what they wait for themselves.
  std::vector<int> find_culprits(const std::vector<Missing>& missing);
  void check_gone(const Call& call, const char* what, const std::vector<Missing>& missing);
  [[noreturn]] void throw_unready(const Call& call, const char* what,
                                  const std::vector<Missing>& missing);

  plan::Topology topology_;
  int first_rank_;  // of this node
  int rank_;
  int num_ranks_;
  Network* network_ = nullptr;
  // What was last told to other nodes, by any thread, and when.
  std::atomic<int> announced_{-1};
  std::atomic<std::int64_t> told_at_{0};
  std::atomic<std::uint32_t> beat_{0};
  int num_lanes_ = 1;
  bool crowded_;  // more ranks than cores: spinning would only keep others from running
  fabric::Fabric fabric_;
  ThreadPool pool_;
  protocol::Doorbell* own_doorbell_ =
      nullptr;  // for the helper thread, which starts before the rest is known
  std::vector<protocol::ControlBlock> control_;  // by rank
  std::vector<protocol::RingSender> senders_;    // [lanes, R]
  std::vector<protocol::RingReceiver> receivers_;
  std::vector<int> all_ranks_;  // this one last
  fabric::Beacon beacon_;
  std::vector<fabric::Beacon::Sight> sights_;              // by rank
  std::vector<fabric::ProcessMemory> memory_;              // by rank
  std::vector<std::shared_ptr<fabric::Mapping>> scratch_;  // by thread
  std::int64_t scratch_bytes_ = 0;
  std::int64_t staging_bytes_ = 0;
  bool pulls_ = false;
  env::CombinePath path_;
  enum Gone : int { kHere, kLeft, kDied };
  std::vector<std::atomic<int>> gone_;  // by rank
  std::atomic<int> num_gone_{0};
};

}  // namespace deep_ep::host
