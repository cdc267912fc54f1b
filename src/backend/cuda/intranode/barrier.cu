#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/intranode/exchange.cuh"
#include "backend/cuda/intranode/steps.hpp"

namespace deep_ep::cuda::intranode {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) barrier(const __grid_constant__ BarrierArgs args) {
  const Comm& comm = args.comm;
  wait_for_kernel_before();
  const std::uint64_t epoch = comm.local->epoch + 1;
  if (__syncthreads_and(may_start(comm)) != 0) {
    post(comm, epoch);
    (void)wait_posted(comm, epoch);
  }
  end_kernel(comm);
}

__global__ void fault(const __grid_constant__ FaultArgs args) {
  for (int i = 0; i < args.comm.num_ranks; ++i) {
    protocol::FaultRecord& record =
        *args.comm.control((args.comm.rank + i) % args.comm.num_ranks).block.fault;
    if (!record.claim()) continue;
    // All but the first word, the state, which publish() sets.
    const auto* from = reinterpret_cast<const std::uint32_t*>(&args.record);
    for (unsigned word = 1; word < sizeof record / 4; ++word)
      reinterpret_cast<std::uint32_t*>(&record)[word] = from[word];
    record.publish();
  }
}

}  // namespace

cudaError_t load_barrier_and_fault() { return load<barrier, fault>(); }

cudaError_t launch_barrier(const BarrierArgs& args, cudaStream_t stream) {
  return launch_kernel(barrier, 1, kThreads, 0, stream, args);
}

cudaError_t launch_fault(const FaultArgs& args, cudaStream_t stream) {
  fault<<<1, 1, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::intranode
