#pragma once

#include "backend/cuda/internode_ll/route.cuh"

// Where a token goes, of so few experts that a lane holds the ids of a whole token: an entry a
// lane, found by comparing in registers. A kernel of few tokens runs through its code once, which
// then costs more than what it does; here is little of it, and no jump.
namespace deep_ep::cuda::internode_ll {

/// Whether a route is found so.
template <class Args>
__device__ bool fits_lanes(const Args& args) {
  return Args::kIsOfFewTokens ||
         (Args::kFew && args.shape.num_topk <= SomeIds::kSize && fits_a_warp(args));
}

/// By the first warp: where `token` goes. False in any lane: an id of a token is not allowed.
__device__ inline bool find_route_in_lanes(const auto& args, std::int64_t token,
                                           const RouteIds& ids, const Route& route) {
  constexpr unsigned kAll = 0xffffffff;
  const int lane = lane_id();
  const bool names = ids.own >= 0 && ids.own < args.shape.num_experts;
  const std::int32_t expert = names ? ids.own : -1;
  const int rank = names ? args.rank_of(expert) : -1;
  const std::uint32_t ranks = __reduce_or_sync(kAll, names ? 1u << rank : 0);
  std::int32_t experts[SomeIds::kSize];
  bool repeated = false;
#pragma unroll
  for (int k = 0; k < SomeIds::kSize; ++k) {
    experts[k] = __shfl_sync(kAll, expert, k);
    repeated = repeated || (k < lane && experts[k] == expert);
  }
  int same_expert = 0;  // earlier tokens that name the lane's expert
  int to_lane = 0;      // earlier tokens that go to the rank whose number is the lane's
  bool good = true;
#pragma unroll 1
  for (std::int64_t base = 0; base < args.num_tokens; base += 32) {
    const SomeIds some = base == 0 ? ids.first : load_ids(args, base + lane, 0);
    if (!some.good) raise_bad_id(args, base + lane);
    good = good && some.good;
    if (base >= token) continue;
    const bool earlier = base + lane < token;
    std::uint32_t others = 0;
#pragma unroll
    for (const std::int32_t id : some.ids)
      if (earlier && id >= 0) others |= 1u << args.rank_of(id);
#pragma unroll
    for (int k = 0; k < SomeIds::kSize; ++k) {
      bool named = false;
#pragma unroll
      for (const std::int32_t id : some.ids) named = named || id == experts[k];
      const int count = __popc(__ballot_sync(kAll, earlier && named));
      if (lane == k) same_expert += count;
    }
#pragma unroll 1
    for (int to = 0; to < args.comm.num_ranks; ++to) {
      const int count = __popc(__ballot_sync(kAll, (others >> to & 1) != 0));
      if (lane == to) to_lane += count;
    }
  }
  const int message = __shfl_sync(kAll, to_lane, rank & 31);
  if (lane < args.shape.num_topk) {
    route.expert[lane] = expert;
    route.begin[lane] = rank * args.local_experts;
    route.index[lane] = same_expert;
    route.message[lane] = message;
    route.rank[lane] = repeated ? -1 : rank;
  }
  if ((ranks >> lane & 1) != 0) {
    const int place = __popc(ranks & ((1u << lane) - 1));
    route.to_rank[place] = lane;
    route.to_message[place] = to_lane;
  }
  if (lane == 0) *route.num_ranks = __popc(ranks);
  return good;
}

/// By all threads of a block: where `token` goes. False in each if an id of any token is not
/// allowed, or `good` is false in any. Nobody reads the last route any more.
__device__ inline bool find_route(const auto& args, std::int64_t token, const RouteIds& ids,
                                  bool good, const Route& route) {
  if (fits_lanes(args)) {
    if (warp_id() == 0) good = find_route_in_lanes(args, token, ids, route) && good;
    return __syncthreads_and(good) != 0;
  }
  return find_route_by_table(args, token, ids, good, route);
}

}  // namespace deep_ep::cuda::internode_ll
