#pragma once

#include "backend/cuda/internode_ll/ticket.cuh"

// Where one token goes: found by a block from the ids of all tokens before it, so that sending
// needs no kernel ahead of it and no exchange between blocks.
namespace deep_ep::cuda::internode_ll {

/// K entries an array.
struct Route {
  std::int32_t* expert;   // of entry k; -1: none
  std::int32_t* begin;    // first expert of that expert's rank
  std::int32_t* index;    // earlier tokens that name this expert
  std::int32_t* message;  // earlier tokens that go to this expert's rank
  std::int32_t* rank;     // of this expert; -1 if none, or an earlier entry has the same expert
  // The ranks that the token goes to, ascending, each once, and its message there.
  std::int32_t* to_rank;
  std::int32_t* to_message;
  std::int32_t* num_ranks;

  __device__ explicit Route(const SharedOffsets& at)
      : expert(shared_at<std::int32_t>(at.route)),
        begin(expert + at.topk),
        index(begin + at.topk),
        message(index + at.topk),
        rank(message + at.topk),
        to_rank(rank + at.topk),
        to_message(to_rank + at.topk),
        num_ranks(to_message + at.topk) {}
};

/// A few ids of one token, loaded before the first is looked at.
struct SomeIds {
  static constexpr int kSize = 8;
  std::int32_t ids[kSize];  // -1: none
  bool good = true;
};

/// Reports the first id of a token that is not allowed.
__device__ __noinline__ inline void raise_bad_id(const StepArgs& args, std::int64_t token) {
#pragma unroll 1
  for (int k = 0; k < args.shape.num_topk; ++k) {
    const std::int64_t id = args.topk_idx[token * args.shape.num_topk + k];
    if (id >= -1 && id < args.shape.num_experts) continue;
    raise_invalid(args.comm, Finding::kBadExpert, token, k, id, args.shape.num_experts);
    return;
  }
}

template <class Id>
__device__ void load_ids_as(const StepArgs& args, const Id* from, int count, SomeIds& some) {
  Id ids[SomeIds::kSize];
#pragma unroll
  for (int i = 0; i < SomeIds::kSize; ++i) ids[i] = i < count ? from[i] : Id{-1};
#pragma unroll
  for (int i = 0; i < SomeIds::kSize; ++i) {
    const bool allowed = ids[i] >= -1 && ids[i] < args.shape.num_experts;
    some.good = some.good && allowed;
    some.ids[i] = allowed ? static_cast<std::int32_t>(ids[i]) : -1;
  }
}

/// Entries [from, from + kSize) of a token; none if there is no such token.
__device__ inline SomeIds load_ids(const StepArgs& args, std::int64_t token, int from) {
  const int topk = args.shape.num_topk;
  const int count = token < args.num_tokens ? topk - from : 0;
  const std::int64_t first = token * topk + from;
  SomeIds some;
  if (args.topk_idx.wide) {
    load_ids_as(args, static_cast<const std::int64_t*>(args.topk_idx.data) + first, count, some);
  } else {
    load_ids_as(args, static_cast<const std::int32_t*>(args.topk_idx.data) + first, count, some);
  }
  return some;
}

/// Bit i: some id is target from + i's expert, or is of its rank.
struct Matches {
  std::uint32_t experts = 0;
  std::uint32_t ranks = 0;
};

__device__ inline void match(const StepArgs& args, const Route& route, int from, int targets,
                             const SomeIds& some, Matches& matches) {
  const auto local_experts = static_cast<std::uint32_t>(args.local_experts);
#pragma unroll 1
  for (int i = 0; i < targets; ++i) {
    const std::int32_t expert = route.expert[from + i];
    const auto begin = static_cast<std::uint32_t>(route.begin[from + i]);
    bool same_expert = false;
    bool same_rank = false;
#pragma unroll
    for (const std::int32_t id : some.ids) {
      same_expert = same_expert || id == expert;
      same_rank = same_rank || static_cast<std::uint32_t>(id) - begin < local_experts;
    }
    // An entry without an expert begins where no id is; its own id is -1, as some others are.
    matches.experts |= std::uint32_t{same_expert && expert >= 0} << i;
    matches.ranks |= std::uint32_t{same_rank && expert >= 0} << i;
  }
}

/// By a warp: for the targets [from, from + 32) of `token`, adds how many tokens before it name
/// their expert, and go to its rank. Looks at the ids of all tokens, since all are checked before
/// anything is sent. `first` are the ids of the thread's first token.
__device__ inline bool count_before(const auto& args, const Route& route, std::int64_t token,
                                    int from, SomeIds some) {
  const int topk = args.shape.num_topk;
  const int targets = topk - from < 32 ? topk - from : 32;
  int same_expert = 0;
  int same_rank = 0;
  bool good = true;
#pragma unroll 1
  for (std::int64_t base = warp_id() * 32; base < args.num_tokens; base += kThreads) {
    const std::int64_t other = base + lane_id();
    Matches matches;
#pragma unroll 1
    for (int k = 0; k < topk; k += SomeIds::kSize) {
      if (k > 0 || base >= kThreads) some = load_ids(args, other, k);
      if (!some.good) raise_bad_id(args, other);
      good = good && some.good;
      if (other < token) match(args, route, from, targets, some, matches);
    }
    if (base >= token) continue;  // of the whole warp
#pragma unroll 1
    for (int i = 0; i < targets; ++i) {
      const int experts = __popc(__ballot_sync(0xffffffff, (matches.experts >> i & 1) != 0));
      const int ranks = __popc(__ballot_sync(0xffffffff, (matches.ranks >> i & 1) != 0));
      if (lane_id() != i) continue;
      same_expert += experts;
      same_rank += ranks;
    }
  }
  if (same_expert != 0) atomicAdd(&route.index[from + lane_id()], same_expert);
  if (same_rank != 0) atomicAdd(&route.message[from + lane_id()], same_rank);
  return good;
}

/// A set of ranks.
template <int kWords>
struct RankSet {
  std::uint32_t words[kWords] = {};

  /// By a warp: adds every lane's rank, if it is not negative.
  __device__ void add(int rank, int num_ranks) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (w * 32 >= num_ranks) break;
      const std::uint32_t mine = rank >= 0 && rank / 32 == w ? 1u << rank % 32 : 0;
      words[w] |= __reduce_or_sync(0xffffffff, mine);
    }
  }
  __device__ bool has(int rank) const {
    bool found = false;
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      found = found || (rank >= 0 && rank / 32 == w && (words[w] >> rank % 32 & 1) != 0);
    return found;
  }
  __device__ int below(int rank) const {
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const std::uint32_t below = rank / 32 > w    ? 0xffffffff
                                  : rank / 32 == w ? (1u << rank % 32) - 1
                                                   : 0;
      count += __popc(words[w] & below);
    }
    return count;
  }
};

/// By one warp: from the experts and messages, the rest of a route. route.rank has every entry's
/// rank before.
template <class Args>
__device__ void list_ranks(const Args& args, const Route& route) {
  const int topk = args.shape.num_topk;
  const int lane = lane_id();
  RankSet<Args::kFew ? 1 : (kMaxRanks + 31) / 32> all;
  for (int base = 0; takes_from(args, base, topk); base += 32)
    all.add(base + lane < topk ? route.rank[base + lane] : -1, args.comm.num_ranks);
  decltype(all) before;
#pragma unroll 1
  for (int base = 0; takes_from(args, base, topk); base += 32) {
    const int k = base + lane;
    const int rank = k < topk ? route.rank[k] : -1;
    const std::int32_t expert = k < topk ? route.expert[k] : -1;
    const auto lower = (1u << lane) - 1;
    const bool first_of_rank =
        (__match_any_sync(0xffffffff, rank) & lower) == 0 && !before.has(rank);
    bool first_of_expert = (__match_any_sync(0xffffffff, expert) & lower) == 0;
#pragma unroll 1
    for (int other = 0; other < base && first_of_expert; ++other)
      first_of_expert = route.expert[other] != expert;
    if (takes_from(args, base + 32, topk)) before.add(rank, args.comm.num_ranks);
    if (rank < 0) continue;
    if (first_of_rank) {
      route.to_rank[all.below(rank)] = rank;
      route.to_message[all.below(rank)] = route.message[k];
    }
    if (!first_of_expert) route.rank[k] = -1;
  }
  int count = 0;
  for (const std::uint32_t word : all.words) count += __popc(word);
  if (lane == 0) *route.num_ranks = count;
}

/// What a thread needs for a route, loaded before anybody waits for it: the ids of its first token,
/// and one of the token's own.
struct RouteIds {
  SomeIds first;
  std::int32_t own;

  __device__ RouteIds(const StepArgs& args, std::int64_t token)
      : first(load_ids(args, threadIdx.x, 0)), own(load_own(args, token, threadIdx.x)) {}
  __device__ static std::int32_t load_own(const StepArgs& args, std::int64_t token, unsigned k) {
    const auto topk = static_cast<unsigned>(args.shape.num_topk);
    return k < topk && token < args.num_tokens
               ? static_cast<std::int32_t>(args.topk_idx[token * topk + k])
               : -1;
  }
};

/// By `threads` threads from the first on: what is known of a route at once.
__device__ inline void begin_route(const auto& args, std::int64_t token, const RouteIds& ids,
                                   int threads, const Route& route) {
#pragma unroll 1
  for (int k = threadIdx.x; k < args.shape.num_topk; k += threads) {
    const std::int32_t expert =
        k < threads ? ids.own : RouteIds::load_own(args, token, static_cast<unsigned>(k));
    const int rank = expert >= 0 && expert < args.shape.num_experts ? args.rank_of(expert) : -1;
    route.expert[k] = expert;
    route.rank[k] = rank;
    route.begin[k] = rank * args.local_experts;
    route.index[k] = 0;
    route.message[k] = 0;
  }
}

__device__ inline bool count_before_all(const auto& args, std::int64_t token, const RouteIds& ids,
                                        const Route& route) {
  bool good = true;
#pragma unroll 1
  for (int from = 0; takes_from(args, from, args.shape.num_topk); from += 32)
    good = count_before(args, route, token, from, ids.first) && good;
  return good;
}

/// So few tokens are one warp's work, beside the others'.
__device__ inline bool fits_a_warp(const StepArgs& args) { return args.num_tokens <= 32; }

/// By the first warp: where `token` goes. False in any lane: an id of a token is not allowed.
__device__ inline bool find_route_in_warp(const auto& args, std::int64_t token, const RouteIds& ids,
                                          const Route& route) {
  begin_route(args, token, ids, 32, route);
  __syncwarp();
  const bool good = count_before_all(args, token, ids, route);
  __syncwarp();
  list_ranks(args, route);
  return good;
}

/// By all threads of a block: where `token` goes. False in each if an id of any token is not
/// allowed, or `good` is false in any. Nobody reads the last route any more.
__device__ inline bool find_route(const auto& args, std::int64_t token, const RouteIds& ids,
                                  bool good, const Route& route) {
  if (fits_a_warp(args)) {
    if (warp_id() == 0) good = find_route_in_warp(args, token, ids, route) && good;
    return __syncthreads_and(good) != 0;
  }
  begin_route(args, token, ids, kThreads, route);
  __syncthreads();
  good = count_before_all(args, token, ids, route) && good;
  if (__syncthreads_and(good) == 0) return false;
  if (warp_id() == 0) list_ranks(args, route);
  __syncthreads();
  return true;
}

/// By all threads of a block: over all tokens, the messages for each rank, and if `rows` is not
/// null the rows for each expert; both in shared memory, filled from zero. False in each if an id
/// is not allowed, or `good` is false in any.
__device__ inline bool count_all(const StepArgs& args, bool good, std::int32_t* messages,
                                 std::int32_t* rows) {
  const int topk = args.shape.num_topk;
#pragma unroll 1
  for (int i = threadIdx.x; i < args.comm.num_ranks; i += kThreads) messages[i] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; rows != nullptr && i < args.shape.num_experts; i += kThreads)
    rows[i] = 0;
  __syncthreads();
  const auto entries = static_cast<unsigned>(args.num_tokens * topk);
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < entries; i += kThreads) {
    const unsigned k = i % topk;
    const std::int64_t id = args.topk_idx[i];
    if (id < -1 || id >= args.shape.num_experts) {
      raise_bad_id(args, i / topk);
      good = false;
    } else if (id >= 0) {
      const int rank = args.rank_of(static_cast<int>(id));
      const std::int64_t begin = rank * args.local_experts;
      bool new_rank = true;
      bool new_expert = true;
#pragma unroll 1
      for (unsigned before = i - k; before < i; ++before) {
        const std::int64_t other = args.topk_idx[before];
        new_expert = new_expert && other != id;
        new_rank = new_rank && (other < begin || other >= begin + args.local_experts);
      }
      if (new_rank) atomicAdd(&messages[rank], 1);
      if (new_expert && rows != nullptr) atomicAdd(&rows[id], 1);
    }
  }
  return __syncthreads_and(good) != 0;
}

}  // namespace deep_ep::cuda::internode_ll
