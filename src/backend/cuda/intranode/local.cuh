#pragma once

#include "backend/cuda/device/waiting.cuh"

// What kernels have in common that work in this rank's own memory alone: they are no epoch.
namespace deep_ep::cuda::intranode {

/// Rows that came, as far as there is `room`: whoever moves them reports more.
__device__ inline std::int64_t received_rows(const std::int32_t* num_received_rows,
                                             std::int64_t room) {
  const std::int64_t rows = *num_received_rows;
  return rows < room ? rows : room;
}

/// By the last block, when all is done: the host sees a fault, and the epoch stays.
__device__ inline void end_local_kernel(const Comm& comm) {
  if (threadIdx.x != 0) return;
  comm.local->blocks_done = 0;
  mirror_fault(comm);
}

}  // namespace deep_ep::cuda::intranode
