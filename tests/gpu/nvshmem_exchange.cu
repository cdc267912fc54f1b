#include <nvshmem.h>
#include <nvshmemx.h>

#include "backend/cuda/device/ptx.cuh"
#include "gpu/nvshmem_exchange.hpp"

namespace deep_ep::test {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kTimeoutNs = 10'000'000'000;

struct Layout {
  std::uint64_t* signals;
  std::byte* inbox;
  std::byte* outbox;

  __device__ Layout(std::byte* base, int ranks)
      : signals(reinterpret_cast<std::uint64_t*>(base)),
        inbox(base + ExchangeLayout::kSignalBytes),
        outbox(inbox + ranks * kMostBytes) {}
};

__global__ void exchange(std::byte* base, int rank, int ranks, std::int64_t bytes,
                         std::uint64_t first, int rounds, ExchangeReport* report) {
  const Layout layout(base, ranks);
  const std::int64_t begin = cuda::globaltimer();
  const std::int64_t words = bytes / 8;
  auto* out = reinterpret_cast<std::uint64_t*>(layout.outbox);
  for (std::uint64_t round = first; round < first + rounds; ++round) {
    for (std::int64_t i = threadIdx.x; i < words; i += blockDim.x)
      out[i] = round * 1000 + static_cast<std::uint64_t>(rank);
    __syncthreads();
    for (int i = 1; i < ranks; ++i) {
      const int to = (rank + i) % ranks;
      nvshmemx_putmem_signal_nbi_block(layout.inbox + rank * kMostBytes, out,
                                       static_cast<std::size_t>(bytes), layout.signals + rank,
                                       round, NVSHMEM_SIGNAL_SET, to);
    }
    for (int i = 1; i < ranks; ++i) {
      const int from = (rank + i) % ranks;
      __shared__ bool here;
      if (threadIdx.x == 0) {
        while (nvshmem_signal_fetch(layout.signals + from) < round &&
               cuda::globaltimer() - begin < kTimeoutNs) {
        }
        here = nvshmem_uint64_test(layout.signals + from, NVSHMEM_CMP_GE, round) != 0;
        if (!here) report->late += 1;
      }
      __syncthreads();
      if (!here) return;
      const auto* in = reinterpret_cast<volatile std::uint64_t*>(layout.inbox + from * kMostBytes);
      for (std::int64_t k = threadIdx.x; k < words; k += blockDim.x)
        if (in[k] < round * 1000) atomicAdd(&report->wrong, 1);
      __syncthreads();
    }
    if (threadIdx.x == 0) nvshmem_quiet();
    __syncthreads();
  }
  if (threadIdx.x == 0) report->ns = cuda::globaltimer() - begin;
}

}  // namespace

cudaError_t launch_exchange(std::byte* base, int rank, int ranks, std::int64_t bytes,
                            std::uint64_t first, int rounds, ExchangeReport* report) {
  exchange<<<1, kThreads>>>(base, rank, ranks, bytes, first, rounds, report);
  return cudaGetLastError();
}

}  // namespace deep_ep::test
