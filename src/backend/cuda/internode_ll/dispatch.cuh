#pragma once

#include "backend/cuda/internode_ll/announce.cuh"
#include "backend/cuda/internode_ll/count.cuh"
#include "backend/cuda/internode_ll/lane_route.cuh"
#include "backend/cuda/internode_ll/receive.cuh"
#include "backend/cuda/internode_ll/stage.cuh"

// The kernels of a dispatch.
namespace deep_ep::cuda::internode_ll {

inline SharedOffsets plan_dispatch(const DispatchArgs& args) {
  const plan::LowLatencyShape& shape = args.shape;
  SharedOffsets at;
  at.take_route(shape);
  at.announced = at.take(std::int64_t{8} * shape.num_ranks);
  at.messages = at.take(std::int64_t{4} * shape.num_ranks);
  at.entries = at.take(static_cast<std::int64_t>(sizeof(HeadEntry)) * shape.num_topk);
  at.places = at.take(static_cast<std::int64_t>(sizeof(RowPlace)) * shape.num_topk);
  at.num_places = at.take(4);
  at.counts = at.take(std::int64_t{4} * shape.num_experts);
  at.row = at.take(plan::row_groups(shape.row_bytes) * MessageArea::kGroupBytes);
  return at;
}

// --- sending ---------------------------------------------------------------------------

/// By all threads of one block: this rank's messages and rows for all others, which it has counted,
/// a warp a rank.
__device__ inline void send_counts(const auto& args, const Ticket& ticket) {
  const auto* messages = shared_at<std::int32_t>(args.shared.messages);
  const auto* counts = shared_at<std::int32_t>(args.shared.counts);
  const bool packeted = sends_packets(args, args.places.messages);
#pragma unroll 1
  for (int rank = warp_id(); rank < args.comm.num_ranks; rank += kWarps) {
    if (is_masked(args, rank)) continue;
    announce(args, ticket, rank, messages[rank], packeted);
    Packet* to = counts_to(args, ticket, rank);
#pragma unroll 1
    for (int i = lane_id(); i < args.places.count_packets; i += 32) {
      std::uint32_t words[3];
#pragma unroll
      for (int w = 0; w < 3; ++w) {
        const int expert = i * 3 + w;
        words[w] = expert < args.local_experts ? counts[rank * args.local_experts + expert] : 0;
      }
      send_packet(to + i, words[0], words[1], words[2], ticket.tag);
    }
    put_call(args, ticket, rank);
  }
}

/// Whether nothing is written to a rank of a token.
__device__ inline bool is_skipped(const auto& args, const Ticket& ticket, int rank) {
  if constexpr (std::remove_cvref_t<decltype(args)>::kPuts) {
    if (is_far(args, rank)) return true;
  }
  return is_masked(args, rank) || (ticket.keeps_own && rank == args.comm.rank);
}

/// By one warp: the head of a token's message for `rank`.
__device__ inline void send_head(const auto& args, const Ticket& ticket, std::int64_t token,
                                 int rank, std::int64_t message, const Route& route) {
  Packet* head = head_to(args, ticket, Area::kMessages, rank, message);
#pragma unroll 1
  for (int part = lane_id(); part <= args.shape.num_topk; part += 32) {
    HeadEntry entry{static_cast<std::int32_t>(token), 0, 0.0f};
    if (part > 0) entry = entry_of(args, token, part - 1, rank, route);
    send_packet(head + part, static_cast<std::uint32_t>(entry.local_expert),
                static_cast<std::uint32_t>(entry.index), __float_as_uint(entry.weight), ticket.tag);
  }
}

/// By one warp: the heads of a token's messages.
__device__ inline void send_heads(const auto& args, const Ticket& ticket, std::int64_t token,
                                  const Route& route) {
#pragma unroll 1
  for (int to = 0; to < *route.num_ranks; ++to) {
    const int rank = route.to_rank[to];
    if (is_skipped(args, ticket, rank)) continue;
    send_head(args, ticket, token, rank, route.to_message[to], route);
  }
}

/// By all threads: the staged row of a token to those of its ranks that it is put to, which have
/// the longest way.
__device__ __noinline__ void put_row(const auto& args, const Ticket& ticket, std::int64_t token,
                                     const Route& route) {
  const auto units = static_cast<int>(args.places.messages.plain_bytes / 16);
  const auto is_put = [&](int to) {
    return is_far(args, route.to_rank[to]) && !is_masked(args, route.to_rank[to]);
  };
  bool any = false;
#pragma unroll 1
  for (int to = 0; to < *route.num_ranks; ++to) {
    any = any || is_far(args, route.to_rank[to]);
    if (!is_put(to)) continue;
    copy_units(shared_at<std::byte>(args.shared.row),
               plain_row_to(args, ticket, Area::kMessages, route.to_rank[to], route.to_message[to]),
               0, units);
    if (warp_id() == 0)
      send_head(args, ticket, token, route.to_rank[to], route.to_message[to], route);
  }
  if (!any) return;
  // What each thread wrote is visible to who puts it.
  fence_acq_rel_sys();
  __syncthreads();
#pragma unroll 1
  for (int to = warp_id(); to < *route.num_ranks; to += kWarps) {
    if (__any_sync(0xffffffff, is_put(to)))
      put_message(args, ticket, Area::kMessages, route.to_rank[to], route.to_message[to]);
  }
}

/// By all threads: a slice of the staged row of a token to all its other ranks, the own one last:
/// what comes later waits for what goes far. The first warp sends heads meanwhile, if rows are
/// packets; plain rows are not shared.
__device__ inline void send_row(const auto& args, const Ticket& ticket, std::int64_t token,
                                const Slice& slice, const Route& route) {
  const MessageArea& area = args.places.messages;
  const bool packeted = sends_packets(args, area);
  if (packeted && warp_id() == 0) {
    if (slice.leads()) send_heads(args, ticket, token, route);
    return;
  }
  const auto* row = shared_at<std::byte>(args.shared.row);
  const int ranks = *route.num_ranks;
  int to = 0;
  while (to < ranks && route.to_rank[to] <= args.comm.rank) ++to;
#pragma unroll 1
  for (int i = 0; i < ranks; ++i, ++to) {
    if (to == ranks) to = 0;
    const int rank = route.to_rank[to];
    const std::int64_t message = route.to_message[to];
    if (is_skipped(args, ticket, rank)) continue;
    if (packeted) {
      send_packets(row,
                   place_at(args, ticket.packet_shift, area.row(args.comm.rank, message), rank),
                   slice, RowWords(args), 1, ticket.tag);
    } else {
      copy_units(row, plain_row_to(args, ticket, Area::kMessages, rank, message), 0,
                 static_cast<int>(area.plain_bytes / 16));
    }
  }
  if (packeted) return;
  __syncthreads();
  if (warp_id() != 0) return;
  // release: with the heads, which are relaxed; pairs with the acquire in take_message().
  fence_acq_rel_sys();
  send_heads(args, ticket, token, route);
}

/// Of slice `number` of all.
template <bool kQuantize>
__device__ RowUnits<kQuantize> first_units_of(const auto& args, std::int64_t number) {
  return RowUnits<kQuantize>(args, number >> args.slice_shift,
                             nth_slice(args, number, args.slice_shift), fits_a_warp(args) ? 1 : 0);
}

template <bool kQuantize, class Args>
__device__ bool send(const Args& args, const Ticket& ticket, bool good, const RouteIds& first_ids,
                     const RowUnits<kQuantize>& first_units) {
  const Route route(args.shared);
  if (counts_for_others()) {
    if (__syncthreads_and(good) == 0) return false;
    send_counts(args, ticket);
  }
  auto* row = shared_at<std::byte>(args.shared.row);
  RouteIds ids = first_ids;
  RowUnits<kQuantize> units = first_units;
  const int shift = args.slice_shift;
#pragma unroll 1
  for (std::int64_t number = first_slice(); number >> shift < args.num_tokens;) {
    const std::int64_t token = number >> shift;
    const Slice slice = nth_slice(args, number, shift);
    __syncthreads();  // the last row is sent
    // The first warp finds the route meanwhile, if the tokens are few.
    units.stage(args, token, slice, row);
    if (!find_route(args, token, ids, good, route)) return false;
    if constexpr (Args::kPuts) put_row(args, ticket, token, route);
    send_row(args, ticket, token, slice, route);
    if constexpr (Args::kIsOfFewTokens) break;
    number += gridDim.x;
    if (number >> shift >= args.num_tokens) break;
    ids = RouteIds(args, number >> shift);
    units = first_units_of<kQuantize>(args, number);
  }
  return __syncthreads_and(good) != 0;
}

/// Sends, receives, or both.
template <bool kQuantize, Form kForm, class Args>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm<Args>)
    dispatch(const __grid_constant__ Formed<Args, kForm> args) {
  wait_for_kernel_before();
  // All that the first token needs is on its way before anything is waited for.
  const std::int64_t number = args.sends ? first_slice() : args.num_tokens << args.slice_shift;
  const TicketWords ticket_words(args);
  const BeginWords words(args);
  const RawRouteIds raw_ids(args, number >> args.slice_shift);
  const RowUnits<kQuantize> units = first_units_of<kQuantize>(args, number);
  if (!args.kIsOfFewTokens && warp_id() == 0) clear_marks(args);
  const RouteIds ids(args, raw_ids);
  bool good = true;
  // Behind nothing but the ids: the others' rows find no place before.
  if (args.sends && counts_for_others())
    good = count_all(args, ids.first, shared_at<std::int32_t>(args.shared.messages),
                     shared_at<std::int32_t>(args.shared.counts));
  Ticket ticket = take_ticket(args, ticket_words);
  // With blocks to spare a block that has nothing else to do is done with the row sooner.
  ticket.keeps_own = !args.kIsOfFewTokens && can_keep_own(args) && args.num_tokens <= gridDim.x &&
                     args.num_tokens * (args.comm.num_ranks + 1) > gridDim.x;
  if (keeps_books() && warp_id() == 0) tell_consumed(args);
  if (keeps_books() && warp_id() == kWarps - 2) count_for_absent(args, ticket);
  if (warp_id() == kWarps - 1) good = may_begin(args, ticket, words) && good;
  if (args.sends) good = send<kQuantize>(args, ticket, good, ids, units);
  // Without sending the threads of the block have not agreed yet.
  if (args.receives && (good || !args.sends)) good = receive(args, ticket, good);
  end_step(args, ticket, good);
  if (args.receives && !good) void_counts(args);
}

template <class Args>
cudaError_t launch_dispatch_kernel(const Args& given, int num_sms, cudaStream_t stream) {
  Args args = given;
  args.shared = plan_dispatch(args);
  args.scales_beside = RowWords::fits(args.x_bytes, args.num_scales);
  const bool packeted = !Args::kPuts && uses_packets(args.places.messages, args.num_tokens);
  // Scales that do not lie beside their values go with all of a row.
  if (packeted && (args.num_scales == 0 || args.scales_beside))
    args.slice_shift = find_slice_shift(args, num_sms);
  const unsigned blocks = num_blocks(args, num_sms, 1 << args.slice_shift);
  return with_form<Args>(form_of(args, blocks, packeted), [&](auto form) {
    return args.quantize
               ? launch_form<dispatch<true, form.value, Args>, form.value>(args, blocks, stream)
               : launch_form<dispatch<false, form.value, Args>, form.value>(args, blocks, stream);
  });
}

template <class Args>
cudaError_t load_dispatch_kernels() {
  return with_all_forms<Args>([](auto form) {
    return load<dispatch<false, form.value, Args>, dispatch<true, form.value, Args>>();
  });
}

}  // namespace deep_ep::cuda::internode_ll
