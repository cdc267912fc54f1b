#pragma once

#include "backend/cuda/device/waiting.cuh"

// All ranks tell each other that they are in a kernel, and with what: barrier and notify.
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
/// rank's arguments.
__device__ inline bool wait_posted(const Comm& comm, std::uint64_t epoch) {
  const protocol::Mailbox mailbox = comm.control(comm.rank).block.mailbox_of(epoch);
  bool good = may_start(comm);
  const auto i = static_cast<int>(threadIdx.x);
  if (good && i < comm.num_ranks) {
    const protocol::EpochFlag& posted = mailbox.posted[i];
    // acquire: pairs with publish() in post() of rank i.
    good = wait_for(
               comm, i, Wait::kCall, epoch, [&] { return posted.reached(epoch); },
               [&] { return posted.seen(); }) &&
           agrees(comm, comm.record, mailbox.record[i], i);
  }
  return __syncthreads_and(good) != 0;
}

}  // namespace deep_ep::cuda::intranode
