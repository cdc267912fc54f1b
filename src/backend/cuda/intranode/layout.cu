#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/intranode/local.cuh"
#include "backend/cuda/intranode/steps.hpp"

namespace deep_ep::cuda::intranode {

namespace {

constexpr int kThreads = 256;
// Counts of experts are gathered in shared memory up to so many.
constexpr int kMaxSharedExperts = 8192;

/// Which ranks of one node a token goes to.
struct RankSet {
  std::uint64_t words[(kMaxRanks + 63) / 64] = {};
  /// False if it was there.
  __device__ bool insert(int rank) {
    const std::uint64_t bit = std::uint64_t{1} << rank % 64;
    const bool fresh = (words[rank / 64] & bit) == 0;
    words[rank / 64] |= bit;
    return fresh;
  }
  __device__ void write(bool* row, int num_ranks) const {
    for (int rank = 0; rank < num_ranks; ++rank)
      row[rank] = (words[rank / 64] >> rank % 64 & 1) != 0;
  }
};

/// The same of any number of ranks, in the token's row of is_token_in_rank itself.
struct RankRow {
  bool* row;
  __device__ RankRow(bool* out, int num_ranks) : row(out) {
    for (int rank = 0; rank < num_ranks; ++rank) row[rank] = false;
  }
  __device__ bool insert(int rank) {
    const bool fresh = !row[rank];
    row[rank] = true;
    return fresh;
  }
};

/// Counts one token; `experts` lies in shared or global memory.
template <class Ranks>
__device__ void count_token(const LayoutArgs& args, std::int64_t token, std::int32_t* ranks,
                            std::int32_t* experts, Ranks& in) {
  const std::uint32_t local_experts = args.num_experts / args.num_ranks;
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
}

/// The same, and fills the token's row of is_token_in_rank.
__device__ void count_token(const LayoutArgs& args, std::int64_t token, std::int32_t* ranks,
                            std::int32_t* experts) {
  bool* row = args.is_token_in_rank + token * args.num_ranks;
  if (args.num_tokens_per_node == nullptr) {
    RankSet in;
    count_token(args, token, ranks, experts, in);
    in.write(row, args.num_ranks);
    return;
  }
  RankRow in(row, args.num_ranks);
  count_token(args, token, ranks, experts, in);
  const int width = args.ranks_per_node;
  for (int node = 0; node < args.num_ranks / width; ++node) {
    bool goes = false;
    for (int i = 0; i < width; ++i) goes = goes || row[node * width + i];
    if (goes) atomicAdd(args.sums + args.num_ranks + args.num_experts + node, 1);
  }
}

/// The sums become the outputs, and zeros again.
__device__ void move_out(std::int32_t* sums, std::int32_t* out, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    out[i] = sums[i];
    sums[i] = 0;
  }
}

__global__ void __launch_bounds__(kThreads) layout(const __grid_constant__ LayoutArgs args) {
  extern __shared__ std::int32_t ranks[];
  std::int32_t* shared = ranks + args.num_ranks;  // experts, if they fit
  const bool gather = args.num_experts <= kMaxSharedExperts;
  for (int i = threadIdx.x; i < args.num_ranks; i += kThreads) ranks[i] = 0;
  if (gather) {
    for (int i = threadIdx.x; i < args.num_experts; i += kThreads) shared[i] = 0;
  }
  __syncthreads();
  wait_for_kernel_before();
  for (std::int64_t token = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
       token < args.num_tokens; token += std::int64_t{gridDim.x} * kThreads) {
    count_token(args, token, ranks, gather ? shared : args.sums + args.num_ranks);
  }
  __syncthreads();
  std::int32_t* rank_sums = args.sums;
  std::int32_t* expert_sums = args.sums + args.num_ranks;
  for (int i = threadIdx.x; i < args.num_ranks; i += kThreads) {
    if (ranks[i] != 0) atomicAdd(rank_sums + i, ranks[i]);
  }
  for (int i = threadIdx.x; gather && i < args.num_experts; i += kThreads) {
    if (shared[i] != 0) atomicAdd(expert_sums + i, shared[i]);
  }
  if (!is_last_block(args.comm)) return;
  move_out(rank_sums, args.num_tokens_per_rank, args.num_ranks);
  move_out(expert_sums, args.num_tokens_per_expert, args.num_experts);
  if (args.num_tokens_per_node != nullptr)
    move_out(expert_sums + args.num_experts, args.num_tokens_per_node,
             args.num_ranks / args.ranks_per_node);
  end_local_kernel(args.comm);
}

}  // namespace

cudaError_t load_layout() { return load<layout>(); }

cudaError_t launch_layout(const LayoutArgs& args, cudaStream_t stream) {
  constexpr std::int64_t kMostBlocks = 32;
  const std::int64_t wanted = (args.num_tokens + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(wanted < 1 ? 1 : wanted > kMostBlocks ? kMostBlocks : wanted);
  const int experts = args.num_experts <= kMaxSharedExperts ? args.num_experts : 0;
  return launch_kernel(layout, blocks, kThreads, (args.num_ranks + experts) * 4, stream, args);
}

}  // namespace deep_ep::cuda::intranode
