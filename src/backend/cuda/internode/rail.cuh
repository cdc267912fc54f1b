#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/internode/steps.hpp"

// How kernels talk to other nodes: puts whose signals order nothing but their own data, so that
// each item has a signal word of its own; and waits that never block in NVSHMEM.
namespace deep_ep::cuda::internode {

/// What a lane looks after: ranks of the node with rank % 32 == lane.
constexpr int kRanksALane = (plan::kMaxRanksPerNode + 31) / 32;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % 32); }

/// Acquire of a word of this rank's heap that others set: what was put with the signal is here.
/// nvshmem_signal_fetch() alone promises the word, nvshmem_uint64_test() the data as well.
__device__ __noinline__ inline bool reached(std::uint64_t* word, std::uint64_t value) {
  if (nvshmem_signal_fetch(word) < value || nvshmem_uint64_test(word, NVSHMEM_CMP_GE, value) == 0)
    return false;
  fence_acq_rel_sys();
  return true;
}

/// Where the pieces of rail peers are mapped here, in shared memory. What is not mapped is put to.
class MappedPeers {
 public:
  /// By all threads of a block, ahead of a barrier.
  __device__ void find(const Rails& rails) {
    if (threadIdx.x == 0) own_ = reinterpret_cast<std::byte*>(rails.block.left);
    for (int i = threadIdx.x; i < rails.shape.num_peers(); i += blockDim.x)
      pieces_[i] = rails.state.mapped[i];
  }
  __device__ bool maps(int peer) const { return pieces_[peer] != nullptr; }
  __device__ bool maps_all(const Rails& rails) const {
    bool all = true;
    for (int i = 0; i < rails.shape.num_peers(); ++i) all = all && maps(i);
    return all;
  }
  /// By a thread: what it has put may be written again, if there are peers to put to.
  __device__ void quiet(const Rails& rails) const {
    if (!maps_all(rails)) nvshmem_quiet();
  }
  /// `address` of this rank's piece in that of a peer, or null.
  template <class T>
  __device__ T* in_piece(int peer, T* address) const {
    std::byte* piece = pieces_[peer];
    if (piece == nullptr) return nullptr;
    return reinterpret_cast<T*>(piece + (reinterpret_cast<std::byte*>(address) - own_));
  }
  /// The same as reached() of a word that the peer sets: by a store if memory is mapped, so that an
  /// acquire will do, whoever stores.
  __device__ bool reached_from(int peer, std::uint64_t* word, std::uint64_t value) const {
    // acquire: pairs with the release in tell_all() of the peer, of an announcement with that in
    // post_rails().
    if (maps(peer)) return protocol::load_acquire(word) >= value;
    return reached(word, value);
  }
  /// By a thread: what a peer has counted of this rank's items; acquire.
  __device__ std::uint64_t fetch_from(int peer, std::uint64_t* word) const {
    // acquire: pairs with the release in tell_all() of the peer.
    if (maps(peer)) return protocol::load_acquire(word);
    const std::uint64_t value = nvshmem_signal_fetch(word);
    fence_acq_rel_sys();
    return value;
  }

 private:
  std::byte* own_;
  std::byte* pieces_[plan::kMaxNodes];
};

/// Takes over what a rank of another node has told, if there is anything: as a fault of this node's
/// ranks. True if there was.
__device__ __noinline__ inline bool adopt_fault(const Comm& comm, const Rails& rails) {
  for (int rank = 0; rank < rails.shape.topology.num_ranks; ++rank) {
    if (!reached(rails.block.faulted + rank, 1)) continue;
    const auto* from = reinterpret_cast<const std::uint32_t*>(rails.block.faults + rank);
    for (int i = 0; i < comm.num_ranks; ++i) {
      protocol::FaultRecord& record = *comm.control((comm.rank + i) % comm.num_ranks).block.fault;
      if (!record.claim()) continue;
      // All but the first word, the state, which publish() sets.
      for (unsigned word = 1; word < sizeof record / 4; ++word)
        reinterpret_cast<std::uint32_t*>(&record)[word] = from[word];
      record.publish();
    }
    return true;
  }
  return false;
}

/// Some rank of some node has a fault that this one has seen.
__device__ inline bool faulted(const Comm& comm, const Rails& rails) {
  return comm.control(comm.rank).block.fault->load() == protocol::FaultRecord::kWritten ||
         (nvshmem_signal_fetch(rails.block.num_faults) != 0 && adopt_fault(comm, rails));
}

/// The Waiter of one thread that waits for rank `awaited` of another node, which is seen to leave
/// in good order, but not to die.
struct RailWaiter {
  const Comm& comm;
  const Rails& rails;
  int awaited;
  std::int64_t more_ns = 0;  // than other waits have
  std::int64_t started = 0;
  bool gone = false;

  __device__ void begin() { started = globaltimer(); }
  __device__ bool faulted() const { return internode::faulted(comm, rails); }
  __device__ bool expired() {
    gone = reached(rails.block.left + awaited, 1);
    return gone || globaltimer() - started > rails.timeout_ns + more_ns;
  }
  /// Looks several times: what else there is to look at is several words, one after the other.
  template <class Ready>
  __device__ bool pause(Ready&& ready) const {
    for (int i = 0; i < kLooks; ++i) {
      __nanosleep(20);
      if (ready()) return true;
    }
    return false;
  }
  static constexpr int kLooks = 8;
  __device__ void report(Wait what, std::uint64_t expected, std::uint64_t seen) const {
    raise_missing(comm, awaited, gone ? kGoneOrderly : 0, what, expected, seen);
  }
};

/// Waits until a word that a peer sets has reached `value`; on failure reports it and returns
/// false.
__device__ __noinline__ inline bool wait_for_rail(const Comm& comm, const Rails& rails,
                                                  const MappedPeers& peers, int peer, Wait what,
                                                  std::uint64_t* word, std::uint64_t value) {
  RailWaiter waiter{comm, rails, rails.rank_of_peer(peer)};
  const protocol::WaitResult result =
      protocol::wait_until(waiter, [&] { return peers.reached_from(peer, word, value); });
  if (result == protocol::WaitResult::kReady) return true;
  if (result == protocol::WaitResult::kExpired)
    waiter.report(what, value, nvshmem_signal_fetch(word));
  return false;
}

/// By a thread of notify, behind what the kernel behind it is to see.
__device__ inline void let_go(const Rails& rails, std::uint64_t number) {
  // release: pairs with the acquire in wait_go().
  if (number != 0) protocol::store_release(rails.state.go, number);
}

/// By a warp of the kernel behind notify: that has let_go(). False: there is a fault, without which
/// it does, or ends with one.
__device__ inline bool wait_go(const Comm& comm, const Rails& rails, std::uint64_t number) {
  bool gone = false;
  if (lane_id() == 0) {
    // acquire: pairs with the release in let_go(), for what the kernels before notify wrote, too.
    while (!(gone = protocol::load_acquire(rails.state.go) == number) && may_start(comm))
      __nanosleep(20);
    fence_proxy_async_global();  // bulk copies come behind it as well
  }
  gone = __shfl_sync(0xffffffff, gone, 0);
  __syncwarp();
  return gone;
}

/// What a ring waits for.
struct Awaited {
  Wait what;
  std::uint64_t expected;
  std::uint64_t seen;
};

/// Of a warp that looks after several rings, none of which it waits for (I20); by one lane.
class Patience {
 public:
  __device__ Patience(const Comm& comm, const Rails& rails, std::int64_t more_ns)
      : waiter_{comm, rails, 0, more_ns} {}
  __device__ void moved() {
    waiter_.started = 0;
    last_look_ = false;
  }
  /// Nothing has moved in a whole turn, for one thing what comes from `rank`: false if it is time
  /// to leave. awaited() says what is missing; once time is up it looks once more first, since
  /// ranks may share a GPU.
  template <class What>
  __device__ bool wait(int rank, What&& awaited) {
    if (waiter_.started == 0) waiter_.begin();
    if (waiter_.faulted()) return false;
    waiter_.awaited = rank;
    if (!waiter_.expired()) {
      __nanosleep(40);
      return true;
    }
    const bool go_on = !last_look_;
    last_look_ = true;
    if (!go_on) {
      const Awaited missing = awaited();
      waiter_.report(missing.what, missing.expected, missing.seen);
    }
    return go_on;
  }

 private:
  RailWaiter waiter_;
  bool last_look_ = false;
};

/// By one thread of a kernel: it has put `puts` times, `bytes` bytes in all, and given `signals`
/// words.
__device__ inline void count_puts(const Rails& rails, unsigned long long puts,
                                  unsigned long long bytes, unsigned long long signals) {
  SentCounts& counts = *rails.state.sent_counts;
  // Nobody waits for these, as for a load.
  atomicAdd(&counts.puts, puts);
  atomicAdd(&counts.put_bytes, bytes);
  atomicAdd(&counts.signals, signals);
}

/// Rows that a dispatch takes from this rank to other nodes, and from those to it. A combine takes
/// as many back.
struct Crossing {
  std::uint64_t out = 0;
  std::uint64_t in = 0;

  __device__ explicit Crossing(const Rails& rails) {
    const plan::Topology& topology = rails.shape.topology;
    for (int node = 0; node < topology.num_nodes(); ++node) {
      if (node == rails.node) continue;
      const auto part = plan::part_of(rails.state.records, node);
      in += static_cast<std::uint64_t>(part.end - part.begin);
      out += static_cast<std::uint64_t>(rails.state.totals[topology.num_ranks + node]);
    }
  }
};

/// By one thread of a kernel: all rows have crossed, and have been answered by a word each.
__device__ __noinline__ inline void count_rows(const Rails& rails, const ItemShape& item,
                                               std::uint64_t out, std::uint64_t in) {
  const std::uint64_t items = out * item.pieces;
  const std::uint64_t bytes = items * item.head_bytes + out * item.x_bytes;
  atomicAdd(&rails.state.sent_counts->rows, static_cast<unsigned long long>(out));
  atomicAdd(&rails.state.sent_counts->row_bytes, static_cast<unsigned long long>(bytes));
  count_puts(rails, items, bytes, items + in * item.pieces);
}

/// By a thread: the ranks of other nodes learn of this one's fault, once. What is put from is not
/// written again, so nothing is waited for.
__device__ __noinline__ inline void tell_fault_once(const Comm& comm, const Rails& rails) {
  const protocol::FaultRecord& own = *comm.control(comm.rank).block.fault;
  if (own.load() != protocol::FaultRecord::kWritten) return;
  auto* told = reinterpret_cast<unsigned long long*>(rails.state.told_fault);
  if (atomicExch(told, 1) != 0) return;
  const auto* from = reinterpret_cast<const std::uint64_t*>(&own);
  auto* to = reinterpret_cast<std::uint64_t*>(rails.block.out_fault);
  for (unsigned i = 0; i < sizeof own / sizeof *from; ++i) to[i] = from[i];
  fence_acq_rel_sys();
  const int rank = rails.rank();
  const std::uint64_t others = rails.shape.topology.num_ranks - comm.num_ranks;
  count_puts(rails, others, others * sizeof own, 2 * others);
  for (int i = 0; i < rails.shape.topology.num_ranks; ++i) {
    if (rails.shape.topology.node_of(i) == rails.node) continue;
    nvshmem_putmem_signal_nbi(rails.block.faults + rank, rails.block.out_fault, sizeof own,
                              rails.block.faulted + rank, 1, NVSHMEM_SIGNAL_SET, i);
    nvshmemx_signal_op(rails.block.num_faults, 1, NVSHMEM_SIGNAL_ADD, i);
  }
}

/// By the last block, before end_kernel().
__device__ inline void tell_fault(const Comm& comm, const Rails& rails) {
  __syncthreads();
  if (threadIdx.x == 0) tell_fault_once(comm, rails);
}

}  // namespace deep_ep::cuda::internode
