#include <nvshmem.h>
#include <nvshmemx.h>

#include "backend/cuda/nvshmem/puts.hpp"

namespace deep_ep::cuda::nvshmem {

namespace {

constexpr int kThreads = 512;

/// No word is zero, nor the same in two ranks, or at two neighbouring places.
__device__ std::uint64_t pattern(int rank, std::int64_t i) {
  return (static_cast<std::uint64_t>(i) * 2 + 1) * 0x9e3779b97f4a7c15U +
         (static_cast<std::uint64_t>(rank) << 1);
}

template <class Body>
__device__ void for_each_word(std::int64_t count, Body&& body) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step)
    body(i);
}

}  // namespace

// Not in the unnamed namespace: device code is linked, and names of kernels would have the file's
// in them.
__global__ void fill_words(std::uint64_t* words, std::int64_t count, int rank) {
  for_each_word(count, [&](std::int64_t i) { words[i] = pattern(rank, i); });
}

__global__ void put_words(PutArrays arrays, int peer, int rounds) {
  const std::int64_t begin = blockIdx.x * arrays.words;
  for (int round = 0; round < rounds; ++round)
    nvshmemx_putmem_nbi_block(arrays.to + begin, arrays.from + begin,
                              static_cast<std::size_t>(arrays.words) * 8, peer);
  __syncthreads();
  if (threadIdx.x == 0) nvshmem_quiet();
}

__global__ void compare_words(const std::uint64_t* words, std::int64_t count, int rank,
                              unsigned long long* wrong) {
  for_each_word(count, [&](std::int64_t i) {
    if (words[i] != pattern(rank, i)) atomicAdd(wrong, 1ULL);
  });
}

cudaError_t launch_fill(std::uint64_t* words, std::int64_t count, int rank, int blocks,
                        cudaStream_t stream) {
  fill_words<<<blocks, kThreads, 0, stream>>>(words, count, rank);
  return cudaGetLastError();
}

cudaError_t launch_puts(const PutArrays& arrays, int peer, int blocks, int rounds,
                        cudaStream_t stream) {
  put_words<<<blocks, kThreads, 0, stream>>>(arrays, peer, rounds);
  return cudaGetLastError();
}

cudaError_t launch_compare(const std::uint64_t* words, std::int64_t count, int rank, int blocks,
                           unsigned long long* wrong, cudaStream_t stream) {
  compare_words<<<blocks, kThreads, 0, stream>>>(words, count, rank, wrong);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::nvshmem
