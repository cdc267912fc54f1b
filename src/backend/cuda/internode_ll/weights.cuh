#pragma once

#include "backend/cuda/internode_ll/announce.cuh"
#include "backend/cuda/internode_ll/count.cuh"
#include "backend/cuda/internode_ll/home.cuh"
#include "backend/cuda/internode_ll/lane_route.cuh"

// What a combine sends first: every token's weights, to the ranks of its experts.
namespace deep_ep::cuda::internode_ll {

/// By all threads of one block: how many weights each rank gets, and how rows come home: in packets
/// or not, as the source wants it, or for rows that are summed already, as their sender does.
__device__ inline bool send_call(const auto& args, const Ticket& ticket, bool good,
                                 const SomeIds& first) {
  auto* messages = shared_at<std::int32_t>(args.shared.messages);
  good = count_all(args, first, messages, nullptr) && good;
  if (__syncthreads_and(good) == 0) return false;
#pragma unroll 1
  for (int rank = warp_id(); rank < args.comm.num_ranks; rank += kWarps) {
    if (is_masked(args, rank)) continue;
    const std::int64_t rows =
        args.is_rank_major() ? shared_at<std::int32_t>(args.shared.ranges)[rank] : args.num_tokens;
    announce(args, ticket, rank, messages[rank], uses_packets(args.places.returns, rows));
    put_call(args, ticket, rank);
  }
  return true;
}

/// By a lane: an entry of this block's token for an expert here, as a row to sum. False, and a
/// fault, if src_info does not name the token.
__device__ inline bool keep_own(const auto& args, std::int64_t token, std::int32_t expert,
                                std::int32_t index, float weight, int position) {
  const std::int64_t max_rows = args.comm.num_ranks * args.shape.max_tokens;
  const std::int64_t row = std::int64_t{shared_at<std::int32_t>(
                               args.shared.ranges)[expert * args.comm.num_ranks + args.comm.rank]} +
                           index;
  const bool inside = row >= 0 && row < max_rows;
  const std::int64_t slot = expert * max_rows + (inside ? row : 0);
  shared_at<Addend>(args.shared.own_addends)[position] = {
      reinterpret_cast<const uint4*>(args.x + slot * args.shape.row_bytes), weight};
  return holds(args, args.comm.rank,
               {static_cast<std::int32_t>(token), inside ? args.src_info[slot] : -1, expert, row});
}

/// By one warp: a token's weights to the ranks of its experts, sorted by expert, if this block
/// `leads`; that of an expert with those of later entries that repeat it. `own` is the lane's first
/// one. False: a fault.
__device__ inline bool send_weights(const auto& args, const Ticket& ticket, std::int64_t token,
                                    float own, bool leads, const Route& route) {
  const int topk = args.shape.num_topk;
  const float* weights = args.topk_weights + token * topk;
  bool good = true;
  *shared_at<std::int32_t>(args.shared.num_own) = 0;
  __syncwarp();
  // What comes first, and the places behind the last one.
#pragma unroll 1
  for (int to = 0; to < *route.num_ranks; ++to) {
    const int rank = route.to_rank[to];
    if (is_masked(args, rank)) continue;
    int count = 0;
#pragma unroll 1
    for (int base = 0; takes_from(args, base, topk); base += 32) {
      const int k = base + lane_id();
      count += __popc(__ballot_sync(0xffffffff, k < topk && route.rank[k] == rank));
    }
    if (ticket.keeps_own && rank == args.comm.rank) {
      *shared_at<std::int32_t>(args.shared.num_own) = count;
      continue;
    }
    Packet* head = head_to(args, ticket, Area::kMessages, rank, route.to_message[to]);
#pragma unroll 1
    for (int part = lane_id(); leads && part <= topk; part += 32) {
      if (part > 0 && part <= count) continue;
      send_packet(head + part, part == 0 ? static_cast<std::uint32_t>(token) : 0xffffffffu, 0, 0,
                  ticket.tag);
    }
  }
#pragma unroll 1
  for (int base = 0; takes_from(args, base, topk); base += 32) {
    const int k = base + lane_id();
    const int rank = k < topk ? route.rank[k] : -1;
    if (rank < 0 || is_masked(args, rank)) continue;
    const std::int32_t expert = route.expert[k];
    float weight = base == 0 ? own : weights[k];
    int position = 0;
#pragma unroll 1
    for (int other = 0; other < topk; ++other) {
      if (route.rank[other] == rank && route.expert[other] < expert) ++position;
      if (other > k && route.expert[other] == expert) weight = plan::add(weight, weights[other]);
    }
    const bool kept = ticket.keeps_own && rank == args.comm.rank;
    if (!kept && leads) {
      Packet* head = head_to(args, ticket, Area::kMessages, rank, route.message[k]);
      send_packet(head + 1 + position, static_cast<std::uint32_t>(expert - route.begin[k]),
                  static_cast<std::uint32_t>(route.index[k]), __float_as_uint(weight), ticket.tag);
    }
    // Behind what others wait for, since it waits itself.
    if (kept)
      good =
          keep_own(args, token, expert - route.begin[k], route.index[k], weight, position) && good;
  }
  return good;
}

/// The same of fewer than 32 entries, one a lane.
__device__ inline bool send_few_weights(const auto& args, const Ticket& ticket, std::int64_t token,
                                        float own, bool leads, const Route& route) {
  constexpr unsigned kAll = 0xffffffff;
  constexpr int kBatch = 8;
  const int lane = lane_id();
  const int topk = args.shape.num_topk;
  const std::int32_t expert = lane < topk ? route.expert[lane] : -1;
  const int rank = lane < topk ? route.rank[lane] : -1;  // -1 of a repetition, too
  float weight = own;
  int position = 0;
#pragma unroll 1
  for (int base = 0; base < topk; base += kBatch) {
#pragma unroll
    for (int other = base; other < base + kBatch; ++other) {
      const std::int32_t their_expert = __shfl_sync(kAll, expert, other);
      const int their_rank = __shfl_sync(kAll, rank, other);
      const float theirs = __shfl_sync(kAll, own, other);
      if (their_rank == rank && their_expert < expert) ++position;
      if (other > lane && their_expert == expert) weight = plan::add(weight, theirs);
    }
  }
  // What comes first, and the places behind the last one.
  int num_own = 0;
#pragma unroll 1
  for (int to = 0; to < *route.num_ranks; ++to) {
    const int to_rank = route.to_rank[to];
    const int count = __popc(__ballot_sync(kAll, rank == to_rank));
    const bool kept = ticket.keeps_own && to_rank == args.comm.rank;
    if (kept) num_own = count;
    if (kept || !leads || is_masked(args, to_rank)) continue;
    Packet* head = head_to(args, ticket, Area::kMessages, to_rank, route.to_message[to]);
    if (lane <= topk && (lane == 0 || lane > count))
      send_packet(head + lane, lane == 0 ? static_cast<std::uint32_t>(token) : 0xffffffffu, 0, 0,
                  ticket.tag);
  }
  *shared_at<std::int32_t>(args.shared.num_own) = num_own;
  if (rank < 0 || is_masked(args, rank)) return true;
  const std::int32_t local = expert - route.begin[lane];
  if (ticket.keeps_own && rank == args.comm.rank)
    return keep_own(args, token, local, route.index[lane], weight, position);
  if (!leads) return true;
  Packet* head = head_to(args, ticket, Area::kMessages, rank, route.message[lane]);
  send_packet(head + 1 + position, static_cast<std::uint32_t>(local),
              static_cast<std::uint32_t>(route.index[lane]), __float_as_uint(weight), ticket.tag);
  return true;
}

/// By the same warp: those that are put.
__device__ inline void put_weights(const auto& args, const Ticket& ticket, const Route& route) {
  if constexpr (std::remove_cvref_t<decltype(args)>::kPuts) {
    bool any = false;
#pragma unroll 1
    for (int to = 0; to < *route.num_ranks; ++to) any = any || is_far(args, route.to_rank[to]);
    if (!any) return;
    // What each lane wrote is visible to who puts it.
    fence_acq_rel_sys();
    __syncwarp();
#pragma unroll 1
    for (int to = 0; to < *route.num_ranks; ++to) {
      const int rank = route.to_rank[to];
      if (__any_sync(0xffffffff, is_far(args, rank) && !is_masked(args, rank)))
        put_message(args, ticket, Area::kMessages, rank, route.to_message[to]);
    }
  }
}

/// What a thread needs for a token's weights, on its way before anybody waits for it.
struct RawWeightIds {
  RawRouteIds ids;
  float weight;

  __device__ RawWeightIds(const auto& args, std::int64_t token)
      : ids(args, token),
        weight(threadIdx.x < static_cast<unsigned>(args.shape.num_topk) &&
                       token < args.num_tokens && args.topk_weights != nullptr
                   ? args.topk_weights[token * args.shape.num_topk + threadIdx.x]
                   : 0.0f) {}
};
struct WeightIds {
  RouteIds ids;
  float weight;

  __device__ WeightIds(const auto& args, const RawWeightIds& raw)
      : ids(args, raw.ids), weight(raw.weight) {}
};

__device__ inline bool send_all_weights(const auto& args, const Ticket& ticket, bool good,
                                        const WeightIds& first, const Route& route) {
  WeightIds loaded = first;
#pragma unroll 1
  for (std::int64_t slice = first_slice(); slice >> args.slice_shift < args.num_tokens;) {
    const std::int64_t token = slice >> args.slice_shift;
    // Weights are sent once.
    const bool leads = (slice & ((1 << args.slice_shift) - 1)) == 0;
    if constexpr (std::remove_cvref_t<decltype(args)>::kIsOfFewTokens) {
      if (!good) return false;  // the route is known, and all threads say the same
    } else {
      __syncthreads();  // the last route has been read
      if (!find_route(args, token, loaded.ids, good, route)) return false;
    }
    if (warp_id() == 0) {
      good = (args.kFew ? send_few_weights(args, ticket, token, loaded.weight, leads, route)
                        : send_weights(args, ticket, token, loaded.weight, leads, route)) &&
             good;
      if (leads) put_weights(args, ticket, route);
    }
    if (args.kIsOfFewTokens) break;
    slice += gridDim.x;
    const std::int64_t next = slice >> args.slice_shift;
    if (next < args.num_tokens) loaded = WeightIds(args, RawWeightIds(args, next));
  }
  return good;
}

}  // namespace deep_ep::cuda::internode_ll
