#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backend/put_rate.hpp"
#include "deep_ep/bootstrap.hpp"

// What NVSHMEM's own puts reach, by which calls between nodes are measured.
namespace deep_ep::cuda::nvshmem {

/// Memory of two ranks that one puts to, words of a pattern that says whose they are.
struct PutArrays {
  std::uint64_t* to;          // in the symmetric heap
  const std::uint64_t* from;  // there, too
  std::int64_t words;         // that a block puts at once
};

/// By `blocks` blocks: writes the pattern of `rank` to `words`, not zero in any word.
cudaError_t launch_fill(std::uint64_t* words, std::int64_t count, int rank, int blocks,
                        cudaStream_t stream);
/// Each block puts its words to `peer` over and over, so many times; ends when they are there.
cudaError_t launch_puts(const PutArrays& arrays, int peer, int blocks, int rounds,
                        cudaStream_t stream);
/// Adds to `wrong` the words that are not of the pattern of `rank`.
cudaError_t launch_compare(const std::uint64_t* words, std::int64_t count, int rank, int blocks,
                           unsigned long long* wrong, cudaStream_t stream);

/// Collective; see CudaParts::measure_puts().
PutRate measure_puts(Bootstrap& bootstrap, int device, const PutPlan& plan);

}  // namespace deep_ep::cuda::nvshmem
