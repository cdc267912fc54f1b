#pragma once

#include "backend/cuda/device/waiting.cuh"

// All ranks tell each other that they are in a kernel, and with what: barrier and notify; and that
// their rows have landed.
namespace deep_ep::cuda::intranode {

/// By the threads of one block: this rank's record, and whatever it wrote to the mailboxes before
/// the last __syncthreads(), to all ranks. The mailbox of two kernels ago is read by nobody any
/// more (I3).
__device__ inline void post(const Comm& comm, std::uint64_t epoch) {
  for (int i = threadIdx.x; i < comm.num_ranks; i += blockDim.x) {
    const int to = (comm.rank + 1 + i) % comm.num_ranks;
    const protocol::Mailbox mailbox = comm.control(to).block.mailbox_of(epoch);
    mailbox.record[comm.rank] = comm.record;
    // release: pairs with the acquire in wait_posted().
    mailbox.posted[comm.rank].publish(epoch);
  }
}

/// By all threads of one block, kMaxRanks at least, true in each: every rank has posted, with this
/// rank's arguments. `stats`, of the ranks of all nodes: += the wait for each, or null.
__device__ inline bool wait_posted(const Comm& comm, std::uint64_t epoch,
                                   std::int64_t* stats = nullptr) {
  const protocol::Mailbox mailbox = comm.control(comm.rank).block.mailbox_of(epoch);
  bool good = may_start(comm);
  const auto i = static_cast<int>(threadIdx.x);
  if (good && i < comm.num_ranks) {
    const long long begin = stats == nullptr ? 0 : clock64();
    const protocol::EpochFlag& posted = mailbox.posted[i];
    // acquire: pairs with publish() in post() of rank i.
    good = wait_for(
               comm, i, Wait::kCall, epoch, [&] { return posted.reached(epoch); },
               [&] { return posted.seen(); }) &&
           agrees(comm, comm.record, mailbox.record[i], comm.global_rank(i));
    if (stats != nullptr) stats[comm.global_rank(i)] += clock64() - begin;
  }
  return __syncthreads_and(good) != 0;
}

/// By the last block: tells each receiver that all rows of this rank are there, and waits for all
/// that come here; true in every thread if they came.
__device__ inline bool exchange_landed(const Comm& comm, std::uint64_t epoch) {
  for (int i = threadIdx.x; i < comm.num_ranks; i += blockDim.x) {
    const int rank = (comm.rank + 1 + i) % comm.num_ranks;
    // release: every block's rows are complete (Pump::finish()) and acquired in is_last_block().
    comm.control(rank).block.landed[comm.rank].publish(epoch);
  }
  // On its way while the others' rows are: a fault that comes later the next kernel finds.
  bool good = no_fault_here(comm);
  for (int i = threadIdx.x; i < comm.num_ranks; i += blockDim.x) {
    const long long begin = clock64();
    const protocol::EpochFlag& landed = comm.control(comm.rank).block.landed[i];
    // acquire: pairs with publish() above at rank i.
    good = wait_for(
               comm, i, Wait::kRows, epoch, [&] { return landed.reached(epoch); },
               [&] { return landed.seen(); }) &&
           good;
    note_wait(comm, i, begin);
  }
  return __syncthreads_and(good) != 0;
}

}  // namespace deep_ep::cuda::intranode
