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

/// So few tokens are one warp's work, beside the others', which in a dispatch stage a row.
__device__ inline bool fits_a_warp(const auto& args) {
  return std::remove_cvref_t<decltype(args)>::kIsOfFewTokens ||
         args.num_tokens <= (args.kind == plan::LowLatencyKind::kDispatch ? 64 : 32);
}

/// A few ids of one token, loaded before the first is looked at.
struct SomeIds {
  static constexpr int kSize = StepArgs::kWholeIds;
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

__device__ inline bool loads_whole(const auto& args) {
  return std::remove_cvref_t<decltype(args)>::kIsOfFewTokens || args.loads_whole_ids();
}

/// Entries [from, from + kSize) of a token as they come from memory, none if there is no such
/// token: nothing waits for them before some_ids() does.
struct RawIds {
  static constexpr int kSize = SomeIds::kSize;
  // 64 bits an id, or of loads_whole() ids of 32 bits the first half of it.
  longlong2 pairs[kSize / 2];

  __device__ RawIds(const auto& args, std::int64_t token, int from) {
    const int count = token < args.num_tokens ? args.shape.num_topk - from : 0;
    const std::int64_t first = token * args.shape.num_topk + from;
#pragma unroll
    for (longlong2& pair : pairs) pair = {-1, -1};
    // As few instructions as can be: memory works through them one after the other.
    if (!loads_whole(args)) {
#pragma unroll
      for (int i = 0; i < kSize; i += 2) {
        if (i < count) pairs[i / 2].x = args.topk_idx[first + i];
        if (i + 1 < count) pairs[i / 2].y = args.topk_idx[first + i + 1];
      }
    } else if (count > 0) {
      const auto* from_memory = reinterpret_cast<const longlong2*>(
          static_cast<const std::byte*>(args.topk_idx.data) + first * (args.topk_idx.wide ? 8 : 4));
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i)
        if (i < kSize / 4 || args.topk_idx.wide) pairs[i] = from_memory[i];
    }
  }
};

__device__ inline SomeIds some_ids(const auto& args, const RawIds& raw) {
  constexpr int kSize = SomeIds::kSize;
  std::int64_t ids[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) ids[i] = i % 2 == 0 ? raw.pairs[i / 2].x : raw.pairs[i / 2].y;
  if (loads_whole(args) && !args.topk_idx.wide) {
#pragma unroll
    for (int i = kSize - 1; i >= 0; --i)
      ids[i] = static_cast<std::int32_t>(ids[i / 2] >> i % 2 * 32);
  }
  const auto experts = static_cast<std::uint64_t>(args.shape.num_experts);
  SomeIds some;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const bool allowed = static_cast<std::uint64_t>(ids[i] + 1) <= experts;
    some.good = some.good && allowed;
    some.ids[i] = allowed ? static_cast<std::int32_t>(ids[i]) : -1;
  }
  return some;
}
__device__ inline SomeIds load_ids(const auto& args, std::int64_t token, int from) {
  return some_ids(args, RawIds(args, token, from));
}

/// By a warp: nothing is marked.
__device__ inline void clear_marks(const StepArgs& args) {
  auto* marks = shared_at<std::uint32_t>(args.shared.marks);
  const int count = args.shape.num_experts + args.comm.num_ranks + 2;
#pragma unroll 1
  for (int i = lane_id(); i < (count + 3) / 4; i += 32)
    reinterpret_cast<uint4*>(marks)[i] = uint4{};
}

/// Which targets an id is: a word for each expert and one for each rank, bit i for target from + i.
/// Words 0 are those of no expert and of no rank.
struct Marks {
  std::uint32_t* experts;
  std::uint32_t* ranks;

  __device__ explicit Marks(const StepArgs& args)
      : experts(shared_at<std::uint32_t>(args.shared.marks)),
        ranks(experts + args.shape.num_experts + 1) {}

  /// By one warp: marks the targets from `from` on, or unmarks them.
  __device__ void mark(const StepArgs& args, const Route& route, int from) const {
    const int k = from + lane_id();
    const int rank = k < args.shape.num_topk ? route.rank[k] : -1;
    if (rank < 0) return;
    atomicOr(&experts[route.expert[k] + 1], 1u << lane_id());
    atomicOr(&ranks[rank + 1], 1u << lane_id());
  }
  __device__ void unmark(const StepArgs& args, const Route& route, int from) const {
    const int k = from + lane_id();
    const std::int32_t expert = k < args.shape.num_topk ? route.expert[k] : -1;
    if (expert < 0 || expert >= args.shape.num_experts) return;
    experts[expert + 1] = 0;
    ranks[args.rank_of(expert) + 1] = 0;
  }
};

/// Bit i of four to byte i.
__device__ inline std::uint32_t spread_bits(std::uint32_t bits) {
  return (bits & 0xf) * 0x00204081u & 0x01010101u;
}

/// By a warp: for the targets [from, from + 32) of `token`, which are marked, adds how many tokens
/// before it name their expert, and go to its rank. Looks at the ids of all tokens, since all are
/// checked before anything is sent. `first` are the ids of the thread's first token.
__device__ inline bool count_before(const auto& args, const Route& route, std::int64_t token,
                                    int from, SomeIds next) {
  const int topk = args.shape.num_topk;
  const int targets = topk - from < 32 ? topk - from : 32;
  const Marks marks(args);
  const int stride = fits_a_warp(args) ? 32 : kThreads;
  int same_expert = 0;
  int same_rank = 0;
  bool good = true;
#pragma unroll 1
  for (std::int64_t base = warp_id() * 32; base < args.num_tokens; base += stride) {
    const std::int64_t other = base + lane_id();
    SomeIds some = next;
    if (base + stride < args.num_tokens) next = load_ids(args, other + stride, 0);
    std::uint32_t experts = 0;
    std::uint32_t ranks = 0;
#pragma unroll 1
    for (int k = 0; k < topk; k += SomeIds::kSize) {
      if (k > 0) some = load_ids(args, other, k);
      if (!some.good) raise_bad_id(args, other);
      good = good && some.good;
      if (other >= token) continue;
#pragma unroll
      for (const std::int32_t id : some.ids) {
        experts |= marks.experts[id + 1];
        ranks |= marks.ranks[id < 0 ? 0 : args.rank_of(id) + 1];
      }
    }
    if (base >= token)
      continue;  // of the whole warp
                 // Four targets at once, a byte each: a warp has 32 tokens.
#pragma unroll 1
    for (int i = 0; i < targets; i += 4) {
      const std::uint32_t of_expert = __reduce_add_sync(0xffffffff, spread_bits(experts >> i));
      const std::uint32_t of_rank = __reduce_add_sync(0xffffffff, spread_bits(ranks >> i));
      if (lane_id() / 4 != i / 4) continue;
      same_expert += of_expert >> lane_id() % 4 * 8 & 0xff;
      same_rank += of_rank >> lane_id() % 4 * 8 & 0xff;
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

/// What a thread needs for a route, on its way before anybody waits for it: the ids of its first
/// token, and one of the token's own.
struct RawRouteIds {
  RawIds first;
  std::int32_t own;

  __device__ RawRouteIds(const auto& args, std::int64_t token)
      : first(args, is_needed(args, token) ? threadIdx.x : args.num_tokens, 0),
        own(load_own(args, token, threadIdx.x)) {}
  /// The last block counts without a token, too; who only receives reads none, since the caller's
  /// ids may be gone by then.
  __device__ static bool is_needed(const StepArgs& args, std::int64_t token) {
    return token < args.num_tokens || (args.sends && counts_for_others());
  }
  __device__ static std::int32_t load_own(const StepArgs& args, std::int64_t token, unsigned k) {
    const auto topk = static_cast<unsigned>(args.shape.num_topk);
    return k < topk && token < args.num_tokens
               ? static_cast<std::int32_t>(args.topk_idx[token * topk + k])
               : -1;
  }
};
struct RouteIds {
  SomeIds first;
  std::int32_t own;

  __device__ RouteIds(const auto& args, const RawRouteIds& raw)
      : first(some_ids(args, raw.first)), own(raw.own) {}
  __device__ RouteIds(const auto& args, std::int64_t token)
      : RouteIds(args, RawRouteIds(args, token)) {}
};

/// By the first warp: what is known of a route at once.
__device__ inline void begin_route(const auto& args, std::int64_t token, const RouteIds& ids,
                                   const Route& route) {
#pragma unroll 1
  for (int base = 0; takes_from(args, base, args.shape.num_topk); base += 32) {
    const int k = base + lane_id();
    if (k >= args.shape.num_topk) continue;
    const std::int32_t expert =
        base == 0 ? ids.own : RawRouteIds::load_own(args, token, static_cast<unsigned>(k));
    const int rank = expert >= 0 && expert < args.shape.num_experts ? args.rank_of(expert) : -1;
    route.expert[k] = expert;
    route.rank[k] = rank;
    route.begin[k] = rank * args.local_experts;
    route.index[k] = 0;
    route.message[k] = 0;
  }
}

/// Counts for all targets. `sync` joins those who count; marking is one warp's.
__device__ inline bool count_before_all(const auto& args, std::int64_t token, const RouteIds& ids,
                                        const Route& route, auto&& sync) {
  const Marks marks(args);
  bool good = true;
#pragma unroll 1
  for (int from = 0; takes_from(args, from, args.shape.num_topk); from += 32) {
    if (warp_id() == 0) marks.mark(args, route, from);
    sync();
    good = count_before(args, route, token, from, ids.first) && good;
    sync();
    if (warp_id() == 0) marks.unmark(args, route, from);
  }
  return good;
}

/// By the first warp: where `token` goes. False in any lane: an id of a token is not allowed.
__device__ inline bool find_route_in_warp(const auto& args, std::int64_t token, const RouteIds& ids,
                                          const Route& route) {
  begin_route(args, token, ids, route);
  __syncwarp();
  const bool good = count_before_all(args, token, ids, route, [] { __syncwarp(); });
  list_ranks(args, route);
  return good;
}

/// By all threads of a block: where `token` goes. False in each if an id of any token is not
/// allowed, or `good` is false in any. Nobody reads the last route any more.
__device__ inline bool find_route_by_table(const auto& args, std::int64_t token,
                                           const RouteIds& ids, bool good, const Route& route) {
  if (fits_a_warp(args)) {
    if (warp_id() == 0) good = find_route_in_warp(args, token, ids, route) && good;
    return __syncthreads_and(good) != 0;
  }
  // What the first warp marks it has written itself.
  if (warp_id() == 0) {
    begin_route(args, token, ids, route);
    __syncwarp();
  }
  good = count_before_all(args, token, ids, route, [] { __syncthreads(); }) && good;
  if (warp_id() == 0) list_ranks(args, route);
  return __syncthreads_and(good) != 0;
}

}  // namespace deep_ep::cuda::internode_ll
