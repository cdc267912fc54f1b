#pragma once

#include <cstddef>

#include "backend/cuda/comm.hpp"
#include "backend/cuda/device/ptx.cuh"
#include "protocol/wait.hpp"

// How kernels wait, and how they tell what went wrong. A kernel that cannot go on leaves, every
// role of it, and the host finds the reason.
namespace deep_ep::cuda {

using protocol::Finding;
using protocol::Wait;

/// The Waiter of one thread that waits for rank `awaited`.
struct DeviceWaiter {
  const Comm& comm;
  int awaited;
  std::int64_t started = 0;
  bool gone = false;

  __device__ void begin() { started = globaltimer(); }
  __device__ bool faulted() const {
    return comm.control(comm.rank).block.fault->load() == protocol::FaultRecord::kWritten;
  }
  __device__ bool expired() {
    const std::int64_t waited = globaltimer() - started;
    // The word lies in host memory: long against a wait of ranks that work, it may cost something.
    if (waited > kLookAfterNs && protocol::load_acquire(&comm.status->gone[awaited]) != 0)
      gone = true;
    return gone || waited > comm.timeout_ns;
  }
  template <class Ready>
  __device__ bool pause(Ready&&) const {
    __nanosleep(20);
    return false;
  }

 private:
  static constexpr std::int64_t kLookAfterNs = 200'000;
};

// ErrorCode's values, which nvcc need not see the exceptions for; checked in faults.cpp.
constexpr std::uint32_t kInvalidArgumentCode = 1;
constexpr std::uint32_t kDisagreementCode = 2;
constexpr std::uint32_t kTimeoutCode = 3;
constexpr std::uint32_t kPeerFailedCode = 4;
constexpr std::uint32_t kCapacityCode = 6;

/// Writes a report into every rank's fault record that has none yet: `code` is the ErrorCode,
/// `rank` the one to blame, counted over all nodes, or -1, and a to d are the numbers of the
/// Finding. Any thread.
__device__ __noinline__ inline void raise(const Comm& comm, Finding finding, std::uint32_t code,
                                          int rank, std::int64_t a, std::int64_t b = 0,
                                          std::int64_t c = 0, std::int64_t d = 0) {
  const std::uint64_t epoch = comm.local->epoch + 1;
  for (int i = 0; i < comm.num_ranks; ++i) {
    protocol::FaultRecord& record =
        *comm.control((comm.rank + i) % comm.num_ranks).block.fault;  // this rank's first
    if (!record.claim()) continue;
    record.code = code;
    record.origin = comm.global_rank(comm.rank);
    record.num_ranks = rank < 0 ? 0 : 1;
    record.ranks[0] = rank;
    record.finding = finding;
    record.operation = static_cast<std::uint32_t>(comm.record.kind);
    record.epoch = epoch;
    record.values[0] = a;
    record.values[1] = b;
    record.values[2] = c;
    record.values[3] = d;
    record.text[0] = '\0';
    record.publish();
  }
}

/// Reports a value that is not allowed, with the numbers of its Finding. Not inlined: a call takes
/// fewer registers than one of raise().
__device__ __noinline__ inline void raise_invalid(const Comm& comm, Finding finding, std::int64_t a,
                                                  std::int64_t b = 0, std::int64_t c = 0,
                                                  std::int64_t d = 0) {
  raise(comm, finding, kInvalidArgumentCode, -1, a, b, c, d);
}

/// What a wait for `rank`, counted over all nodes, that did not end well has to tell. `gone`: as
/// the helper thread saw it, or 0.
__device__ inline void raise_missing(const Comm& comm, int rank, std::uint32_t gone, Wait what,
                                     std::uint64_t expected, std::uint64_t seen) {
  raise(comm, gone != 0 ? Finding::kGone : Finding::kTimeout,
        gone != 0 ? kPeerFailedCode : kTimeoutCode, rank, static_cast<std::int64_t>(what),
        static_cast<std::int64_t>(expected), static_cast<std::int64_t>(seen), gone == kGoneOrderly);
}

/// Waits until ready(), for what `rank` does; on failure reports it and returns false. `seen()` is
/// the counter that was to reach `expected`.
template <class Ready, class Seen>
__device__ bool wait_for(const Comm& comm, int rank, Wait what, std::uint64_t expected,
                         Ready&& ready, Seen&& seen) {
  DeviceWaiter waiter{comm, rank};
  const protocol::WaitResult result = protocol::wait_until(waiter, ready);
  if (result == protocol::WaitResult::kReady) return true;
  if (result == protocol::WaitResult::kFaulted) return false;
  raise_missing(comm, comm.global_rank(rank), waiter.gone ? comm.status->gone[rank] : 0, what,
                expected, seen());
  return false;
}

/// Reports the first field on which two records differ; `rank` is counted over all nodes.
__device__ __noinline__ inline void raise_disagreement(const Comm& comm,
                                                       const protocol::CallRecord& mine,
                                                       const protocol::CallRecord& theirs,
                                                       int rank) {
  for (int i = 0; i < protocol::CallRecord::kNumAgreed; ++i) {
    if (mine.agreed(i) == theirs.agreed(i)) continue;
    raise(comm, Finding::kDisagreement, kDisagreementCode, rank, i, mine.agreed(i),
          theirs.agreed(i));
    return;
  }
}

/// True if `rank`, counted over all nodes, whose record of the call is here, called with what this
/// rank called with.
__device__ inline bool agrees(const Comm& comm, const protocol::CallRecord& mine,
                              const protocol::CallRecord& theirs, int rank) {
  // All words that must agree, loaded before the first is looked at.
  constexpr int kWords = offsetof(protocol::CallRecord, num_tokens) / 8;
  static_assert(sizeof(protocol::CallRecord) == kWords * 8 + 8, "num_tokens alone may differ");
  const auto* a = reinterpret_cast<const std::uint64_t*>(&mine);
  const auto* b = reinterpret_cast<const std::uint64_t*>(&theirs);
  std::uint64_t difference = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) difference |= a[i] ^ b[i];
  if (difference == 0) return true;
  raise_disagreement(comm, mine, theirs, rank);
  return false;
}

/// False if this Buffer is faulted: the kernel leaves then, with all its roles.
__device__ inline bool may_start(const Comm& comm) {
  return comm.control(comm.rank).block.fault->load() == protocol::FaultRecord::kNone;
}

/// The same without order: of what this rank's own blocks have found, behind is_last_block().
__device__ inline bool no_fault_here(const Comm& comm) {
  return protocol::load_relaxed(&comm.control(comm.rank).block.fault->state) ==
         protocol::FaultRecord::kNone;
}

/// True in every thread of the one block that comes here last. What all blocks wrote, peers' memory
/// included, is then visible to it, and to whoever acquires what it releases. `good` becomes false
/// there if it was in any thread of any block.
__device__ inline bool is_last_block(const Comm& comm, bool& good) {
  constexpr std::uint32_t kFailed = 1 << 16;  // counted beside the blocks
  __shared__ std::uint32_t before;
  good = __syncthreads_and(good) != 0;
  if (threadIdx.x == 0) {
    // acq_rel: each block's pairs with the last one's. Of this GPU only: what goes to peers is
    // released to them by the last block (I12).
    ::cuda::atomic_ref<std::uint32_t, ::cuda::thread_scope_device> done(comm.local->blocks_done);
    before = done.fetch_add(good ? 1 : 1 + kFailed, ::cuda::std::memory_order_acq_rel);
  }
  __syncthreads();
  good = good && before < kFailed;
  return before % kFailed + 1 == gridDim.x;
}
__device__ inline bool is_last_block(const Comm& comm) {
  bool good = true;
  return is_last_block(comm, good);
}

/// Hands this rank's fault record to the host, if it is there.
__device__ __noinline__ inline void mirror_fault(const Comm& comm) {
  const protocol::FaultRecord& own = *comm.control(comm.rank).block.fault;
  // In this order: the host's memory is far away.
  if (own.load() == protocol::FaultRecord::kNone || comm.status->faulted != 0) return;
  // A writer needs microseconds, unless it died on the way.
  DeviceWaiter waiter{comm, comm.rank};
  waiter.begin();
  while (!waiter.faulted() && globaltimer() - waiter.started < 100'000'000) __nanosleep(1000);
  const auto* from = reinterpret_cast<const std::uint64_t*>(&own);
  auto* to = reinterpret_cast<std::uint64_t*>(&comm.status->fault);
  for (unsigned i = 0; i < sizeof own / sizeof *from; ++i) to[i] = from[i];
  // release: pairs with the acquire in Faults::error().
  protocol::store_release(&comm.status->faulted, 1u);
}

/// By the last block, when all is done: the next collective kernel has the next epoch, and the host
/// sees a fault, unless there was none a moment ago (`looked`): then a later kernel shows it.
__device__ inline void end_kernel(const Comm& comm, std::uint64_t epoch, bool looked) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  comm.local->blocks_done = 0;
  comm.local->epoch = epoch;
  if (!looked) mirror_fault(comm);
}
__device__ inline void end_kernel(const Comm& comm, bool looked = false) {
  end_kernel(comm, comm.local->epoch + 1, looked);
}

/// A wait for `rank` since clock64() was `begin`, for the statistics.
__device__ __noinline__ inline void note_wait(const Comm& comm, int rank, long long begin) {
  atomicMax(&comm.local->waited[rank], static_cast<unsigned long long>(clock64() - begin));
}

/// Adds the kernel's longest waits to `stats` [R], if there are any; by the last block.
__device__ inline void flush_waits(const Comm& comm, std::int64_t* stats) {
  for (int i = threadIdx.x; i < comm.num_ranks; i += blockDim.x) {
    if (stats != nullptr) stats[i] += static_cast<std::int64_t>(comm.local->waited[i]);
    comm.local->waited[i] = 0;
  }
}

}  // namespace deep_ep::cuda
