#pragma once

#include "backend/cuda/internode_ll/route.cuh"

// What a rank sends in all, counted by one block for the others, which wait for it before they
// place a row.
namespace deep_ep::cuda::internode_ll {

/// By one thread: adds a token's ids to what is counted.
__device__ __noinline__ inline bool count_token(const StepArgs& args, std::int64_t token,
                                                std::int32_t* messages, std::int32_t* rows) {
  const int topk = args.shape.num_topk;
#pragma unroll 1
  for (int k = 0; k < topk; ++k) {
    const std::int64_t id = args.topk_idx[token * topk + k];
    if (id < -1 || id >= args.shape.num_experts) {
      raise_bad_id(args, token);
      return false;
    }
    if (id < 0) continue;
    const int rank = args.rank_of(static_cast<int>(id));
    const std::int64_t begin = rank * args.local_experts;
    bool new_rank = true;
    bool new_expert = true;
#pragma unroll 1
    for (int before = 0; before < k; ++before) {
      const std::int64_t other = args.topk_idx[token * topk + before];
      new_expert = new_expert && other != id;
      new_rank = new_rank && (other < begin || other >= begin + args.local_experts);
    }
    if (new_rank) atomicAdd(&messages[rank], 1);
    if (new_expert && rows != nullptr) atomicAdd(&rows[id], 1);
  }
  return true;
}

/// By a warp, a token a lane, whose ids are all in `some`: the same.
__device__ inline void count_tokens(const StepArgs& args, const SomeIds& some,
                                    std::int32_t* messages, std::int32_t* rows) {
  std::uint32_t ranks = 0;
#pragma unroll
  for (int i = 0; i < SomeIds::kSize; ++i) {
    const std::int32_t id = some.ids[i];
    bool is_new = id >= 0;
#pragma unroll
    for (int before = 0; before < i; ++before) is_new = is_new && some.ids[before] != id;
    if (is_new) {
      ranks |= 1u << args.rank_of(id);
      if (rows != nullptr) atomicAdd(&rows[id], 1);
    }
  }
  // A rank a lane: tokens go to few ranks, whose counters all would add to at once.
  int count = 0;
#pragma unroll 1
  for (int rank = 0; rank < args.comm.num_ranks; ++rank) {
    const int found = __popc(__ballot_sync(0xffffffff, (ranks >> rank & 1) != 0));
    if (lane_id() == rank) count = found;
  }
  if (count != 0) atomicAdd(&messages[lane_id()], count);
}

/// By all threads of a block: over all tokens, the messages for each rank, and if `rows` is not
/// null the rows for each expert; both in shared memory, filled from zero. False in any thread if
/// an id is not allowed. Joined by the caller. `first` are the ids of the thread's first token.
__device__ inline bool count_all(const auto& args, const SomeIds& first, std::int32_t* messages,
                                 std::int32_t* rows) {
  bool good = true;
#pragma unroll 1
  for (int i = threadIdx.x; i < args.comm.num_ranks; i += kThreads) messages[i] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; rows != nullptr && i < args.shape.num_experts; i += kThreads)
    rows[i] = 0;
  __syncthreads();
  SomeIds some = first;
#pragma unroll 1
  for (std::int64_t base = warp_id() * 32; base < args.num_tokens; base += kThreads) {
    const std::int64_t token = base + lane_id();
    if (args.kIsOfFewTokens || (args.kFew && args.shape.num_topk <= SomeIds::kSize)) {
      if (!args.kIsOfFewTokens && base >= kThreads) some = load_ids(args, token, 0);
      if (!some.good) raise_bad_id(args, token);
      good = good && some.good;
      count_tokens(args, some, messages, rows);
    } else if (token < args.num_tokens) {
      good = count_token(args, token, messages, rows) && good;
    }
  }
  return good;
}

}  // namespace deep_ep::cuda::internode_ll
