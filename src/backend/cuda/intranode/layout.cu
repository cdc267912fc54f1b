#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/intranode/local.cuh"
#include "backend/cuda/intranode/steps.hpp"

namespace deep_ep::cuda::intranode {

namespace {

constexpr int kThreads = 256;
// Counts of experts are gathered in shared memory up to so many.
constexpr int kMaxSharedExperts = 8192;

/// Which ranks a token goes to.
struct RankSet {
  std::uint64_t words[(kMaxRanks + 63) / 64] = {};
  /// False if it was there.
  __device__ bool insert(int rank) {
    const std::uint64_t bit = std::uint64_t{1} << rank % 64;
    const bool fresh = (words[rank / 64] & bit) == 0;
    words[rank / 64] |= bit;
    return fresh;
  }
  __device__ bool has(int rank) const { return (words[rank / 64] >> rank % 64 & 1) != 0; }
};

/// Counts one token; `experts` lies in shared or global memory.
__device__ void count_token(const LayoutArgs& args, std::int64_t token, std::int32_t* ranks,
                            std::int32_t* experts) {
  const std::uint32_t local_experts = args.num_experts / args.comm.num_ranks;
  RankSet in;
  for (int k = 0; k < args.num_topk; ++k) {
    const std::int64_t id = args.topk_idx[token * args.num_topk + k];
    if (id == -1) continue;
    if (id < 0 || id >= args.num_experts) {
      raise_invalid(args.comm, Finding::kBadExpert, token, k, id, args.num_experts);
      continue;
    }
    atomicAdd(experts + id, 1);
    const int rank = static_cast<int>(static_cast<std::uint32_t>(id) / local_experts);
    if (in.insert(rank)) atomicAdd(ranks + rank, 1);
  }
  bool* row = args.is_token_in_rank + token * args.comm.num_ranks;
  for (int rank = 0; rank < args.comm.num_ranks; ++rank) row[rank] = in.has(rank);
}

/// The sums become the outputs, and zeros again.
__device__ void move_out(std::int32_t* sums, std::int32_t* out, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    out[i] = sums[i];
    sums[i] = 0;
  }
}

__global__ void __launch_bounds__(kThreads) layout(const __grid_constant__ LayoutArgs args) {
  extern __shared__ std::int32_t shared[];  // experts, if they fit
  __shared__ std::int32_t ranks[kMaxRanks];
  const bool gather = args.num_experts <= kMaxSharedExperts;
  for (int i = threadIdx.x; i < args.comm.num_ranks; i += kThreads) ranks[i] = 0;
  if (gather) {
    for (int i = threadIdx.x; i < args.num_experts; i += kThreads) shared[i] = 0;
  }
  __syncthreads();
  for (std::int64_t token = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
       token < args.num_tokens; token += std::int64_t{gridDim.x} * kThreads) {
    count_token(args, token, ranks, gather ? shared : args.sums + args.comm.num_ranks);
  }
  __syncthreads();
  std::int32_t* rank_sums = args.sums;
  std::int32_t* expert_sums = args.sums + args.comm.num_ranks;
  for (int i = threadIdx.x; i < args.comm.num_ranks; i += kThreads) {
    if (ranks[i] != 0) atomicAdd(rank_sums + i, ranks[i]);
  }
  for (int i = threadIdx.x; gather && i < args.num_experts; i += kThreads) {
    if (shared[i] != 0) atomicAdd(expert_sums + i, shared[i]);
  }
  if (!is_last_block(args.comm)) return;
  move_out(rank_sums, args.num_tokens_per_rank, args.comm.num_ranks);
  move_out(expert_sums, args.num_tokens_per_expert, args.num_experts);
  end_local_kernel(args.comm);
}

}  // namespace

cudaError_t load_layout() { return load<layout>(); }

cudaError_t launch_layout(const LayoutArgs& args, cudaStream_t stream) {
  constexpr std::int64_t kMostBlocks = 32;
  const std::int64_t wanted = (args.num_tokens + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(wanted < 1 ? 1 : wanted > kMostBlocks ? kMostBlocks : wanted);
  const int shared = args.num_experts <= kMaxSharedExperts ? args.num_experts * 4 : 0;
  layout<<<blocks, kThreads, shared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::intranode
