#pragma once

#include "backend/cuda/internode_ll/stage.cuh"
#include "backend/cuda/internode_ll/weights.cuh"

// The steps of a combine, whatever its rows look like on their way home. That says `Rows`:
//   kKeepsOwn           whether a token's block sums the rows of its own rank by itself
//   x_bytes(args)       of a row of x, and of the result
//   stage(args, slice)  by all threads: this rank's row for a message, into shared memory
//   sum_token(...)      by all threads, true in each: a token's sum
namespace deep_ep::cuda::internode_ll {

inline SharedOffsets plan_combine(const CombineArgs& args) {
  const plan::LowLatencyShape& shape = args.shape;
  SharedOffsets at;
  at.take_route(shape);
  at.announced = at.take(std::int64_t{8} * shape.num_ranks);
  at.messages = at.take(std::int64_t{4} * shape.num_ranks);
  at.places = at.take(static_cast<std::int64_t>(sizeof(Addend)) * shape.num_topk);
  at.num_places = at.take(4);
  at.ranges = at.take(std::int64_t{4} * shape.num_experts);
  at.row = at.take(args.places.returns.row_groups * MessageArea::kGroupBytes);
  at.own_addends = at.take(static_cast<std::int64_t>(sizeof(Addend)) * shape.num_topk);
  at.num_own = at.take(4);
  at.own_row = at.take(shape.row_bytes);
  return at;
}

/// What layout_range says, in shared memory: where the rows of an expert and a source begin, or in
/// rank-major how many a source has. The first one of a thread is on its way before anybody waits.
struct Ranges {
  std::int32_t first = 0;
  int count;

  __device__ explicit Ranges(const auto& args)
      : count(!args.sends            ? 0
              : args.is_rank_major() ? args.comm.num_ranks
                                     : args.shape.num_experts) {
    if (static_cast<int>(threadIdx.x) < count) first = load(args, threadIdx.x);
  }
  /// Joined by the caller.
  __device__ void keep(const auto& args) const {
    auto* ranges = shared_at<std::int32_t>(args.shared.ranges);
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads)
      ranges[i] = i < kThreads ? first : load(args, i);
  }

 private:
  static __device__ std::int32_t load(const auto& args, int i) {
    const std::int64_t range = args.layout_range[i];
    if (!args.is_rank_major()) return static_cast<std::int32_t>(range >> 32);
    // The handle may be anything.
    const auto rows = static_cast<std::int32_t>(range & 0xffffffff);
    return max(0, min(rows, static_cast<std::int32_t>(args.shape.max_tokens)));
  }
};

// --- rows home -------------------------------------------------------------------------

/// By all threads, true in each: the row for one message, or a slice of it.
template <class Rows>
__device__ bool serve(const auto& args, const Ticket& ticket, int source, std::int64_t message,
                      const Slice& slice, bool packeted) {
  bool good = true;
  Claim claim;
  if (args.is_rank_major()) {
    if (threadIdx.x == 0) {
      const std::int64_t row = source * args.shape.max_tokens + message;
      shared_at<Addend>(args.shared.places)[0] = {
          reinterpret_cast<const uint4*>(args.x + row * Rows::x_bytes(args)), 1.0f};
    }
  } else if (warp_id() == 0) {
    good = take_weights(args, ticket, source, message, Rows::x_bytes(args), claim);
  }
  if (__syncthreads_and(good) == 0) return false;
  Rows::stage(args, slice);
  if (__syncthreads_and(holds(args, source, claim)) == 0) return false;
  send_home(args, ticket, source, message, slice, packeted);
  return true;
}

/// Blocks take turns at the messages of all sources, those without a token of their own first.
template <class Rows>
__device__ bool send_all_home(const auto& args, const Ticket& ticket) {
  const Announced announced(args.shared, args.comm.num_ranks);
  const unsigned blocks = gridDim.x;
  const auto slices = static_cast<unsigned>(args.num_tokens) << args.slice_shift;
  unsigned turn = first_behind(slices);
#pragma unroll 1
  for (int i = 1; i <= args.comm.num_ranks; ++i) {
    const int source = rank_from_own(args, i);
    if (ticket.keeps_own && source == args.comm.rank) continue;
    const auto messages = static_cast<unsigned>(
        args.is_rank_major() ? shared_at<std::int32_t>(args.shared.ranges)[source]
                             : announced.messages[source]);
    const bool packeted = args.is_rank_major()
                              ? uses_packets(args.places.returns, messages) && !is_far(args, source)
                              : announced.packeted[source] != 0;
    // Plain rows have one head, and are not shared.
    const int shift = packeted ? args.slice_shift : 0;
#pragma unroll 1
    for (; turn < messages << shift; turn += blocks) {
      // All threads alike, whatever another block masks meanwhile; and the last message's rows have
      // been read.
      if (__syncthreads_or(is_masked(args, source)) != 0) continue;
      if (!serve<Rows>(args, ticket, source, turn >> shift, nth_slice(args, turn, shift), packeted))
        return false;
    }
    turn -= messages << shift;
  }
  return true;
}

template <class Rows>
__device__ bool send(const auto& args, const Ticket& ticket, bool good, const WeightIds& first,
                     const Route& route) {
  if (counts_for_others() && !send_call(args, ticket, good, first.ids.first)) return false;
  if (!args.is_rank_major()) {
    good = send_all_weights(args, ticket, good, first, route);
    const Announced announced(args.shared, args.comm.num_ranks);
    // The first warp sends weights.
#pragma unroll 1
    for (int i = (threadIdx.x + kThreads - 32) % kThreads; i < args.comm.num_ranks; i += kThreads)
      good = take_announced(args, ticket, i, announced) && good;
    if (keeps_books()) good = all_agree(args, ticket) && good;
  }
  if (__syncthreads_and(good) == 0) return false;
  return send_all_home<Rows>(args, ticket);
}

// --- sums ------------------------------------------------------------------------------

/// Whether the i-th rank of a route is this one, which keeps what it has for the token.
__device__ inline bool is_kept(const auto& args, const Ticket& ticket, const Route& route, int i) {
  if (!ticket.keeps_own || route.to_rank[i] != args.comm.rank) return false;
  // A row that a rank-major handle does not know is waited for in vain, as on other ranks.
  return !args.is_rank_major() ||
         route.to_message[i] < shared_at<std::int32_t>(args.shared.ranges)[args.comm.rank];
}

/// By all threads, true in each: plain rows of a token are here. Sets to_rank to -1 for ranks that
/// are absent.
__device__ inline bool await_rows(const auto& args, const Ticket& ticket, const Route& route) {
  const Announced announced(args.shared, args.comm.num_ranks);
  bool good = true;
#pragma unroll 1
  for (int i = threadIdx.x; i < *route.num_ranks; i += kThreads) {
    const int rank = route.to_rank[i];
    if (announced.packeted[rank] != 0 || is_kept(args, ticket, route, i)) continue;
    Packet packet;
    const auto head = head_from(args, ticket, Area::kReturns, rank, route.to_message[i]);
    const Arrival arrival = await_packet(args, rank, head, ticket.tag, packet);
    good = good && arrival != Arrival::kFailed;
    if (arrival == Arrival::kAbsent) route.to_rank[i] = -1;
    // acquire: pairs with the fence in send_home() of that rank.
    acquire(head);
  }
  return __syncthreads_and(good) != 0;
}

/// The plain row that came from the i-th rank of the route, or was kept.
__device__ inline const std::byte* plain_home(const auto& args, const Ticket& ticket,
                                              const Route& route, int i) {
  if (is_kept(args, ticket, route, i)) {
    if (!args.is_rank_major()) return shared_at<std::byte>(args.shared.own_row);
    return args.x +
           (args.comm.rank * args.shape.max_tokens + route.to_message[i]) * args.shape.row_bytes;
  }
  return plain_row_from(args, ticket, Area::kReturns, route.to_rank[i], route.to_message[i]);
}

template <class Rows>
__device__ bool receive(const auto& args, const Ticket& ticket, bool good, const RouteIds& first,
                        const Route& route) {
  __syncthreads();
  // Which ranks' rows are in packets: in expert-major as this rank chose for its own.
  const Announced announced(args.shared, args.comm.num_ranks);
  const bool packeted = sends_packets(args, args.places.returns);
#pragma unroll 1
  for (int i = threadIdx.x; i < args.comm.num_ranks; i += kThreads) {
    if (args.is_rank_major()) {
      good = take_announced(args, ticket, i, announced) && good;
    } else {
      announced.packeted[i] = packeted && !is_far(args, i) ? 1 : 0;
    }
    if (ticket.keeps_own && i == args.comm.rank) announced.packeted[i] = 0;
  }
  if (args.is_rank_major() && keeps_books()) good = all_agree(args, ticket) && good;
  // A block that has sent the weights of one token knows its route; of few tokens all do.
  const bool known =
      !args.is_rank_major() && (args.kIsOfFewTokens || (args.sends && has_slice_each(args)));
#pragma unroll 1
  for (std::int64_t number = first_slice(); number >> args.slice_shift < args.num_tokens;
       number += gridDim.x) {
    const std::int64_t token = number >> args.slice_shift;
    const Slice slice = nth_slice(args, number, args.slice_shift);
    if (known) {
      if (__syncthreads_and(good) == 0) return false;
    } else {
      const bool loaded =
          args.kIsOfFewTokens || (args.kFew && args.is_rank_major() && number == first_slice());
      const RouteIds ids = loaded ? first : RouteIds(args, token);
      if (!find_route(args, token, ids, good, route)) return false;
    }
    if (!Rows::sum_token(args, ticket, token, slice, route)) return false;
    if (args.kIsOfFewTokens) break;
  }
  return __syncthreads_and(good) != 0;
}

/// Rows of a call that failed.
template <class Rows>
__device__ __noinline__ void fill_nan(const auto& args) {
  const std::int64_t units = Rows::x_bytes(args) / 16;
  constexpr std::uint32_t kNan = 0x7fff7fff;
#pragma unroll 1
  for (std::int64_t token = first_token(); token < args.num_tokens; token += gridDim.x) {
    auto* out = reinterpret_cast<uint4*>(args.combined_x + token * Rows::x_bytes(args));
#pragma unroll 1
    for (std::int64_t i = threadIdx.x; i < units; i += kThreads) out[i] = {kNan, kNan, kNan, kNan};
  }
}

/// A kernel: sends, receives, or both.
template <class Rows>
__device__ void run_combine(const auto& args) {
  wait_for_kernel_before();
  // All that the first token needs is on its way before anything is waited for.
  const bool begins = args.kIsOfFewTokens || (args.is_rank_major() ? args.receives : args.sends);
  const TicketWords ticket_words(args);
  const BeginWords words(args);
  const RawWeightIds raw(args, begins ? first_slice() >> args.slice_shift : args.num_tokens);
  const Ranges ranges(args);
  const Route route(args.shared);
  if (!args.kIsOfFewTokens && warp_id() == 0) clear_marks(args);
  const WeightIds first(args, raw);
  Ticket ticket = take_ticket(args, ticket_words);
  ticket.keeps_own = Rows::kKeepsOwn && can_keep_own(args) && has_slice_each(args);
  ranges.keep(args);
  if (keeps_books() && warp_id() == 0) tell_consumed(args);
  if (keeps_books() && warp_id() == kWarps - 2) count_for_absent(args, ticket);
  bool good = warp_id() != kWarps - 1 || may_begin(args, ticket, words);
  const std::int64_t token = first_slice() >> args.slice_shift;
  if (args.kIsOfFewTokens && !args.is_rank_major() && token < args.num_tokens)
    good = find_route(args, token, first.ids, good, route);
  if (args.sends) good = send<Rows>(args, ticket, good, first, route);
  // Without sending the threads of the block have not agreed yet.
  if (args.receives && (good || !args.sends))
    good = receive<Rows>(args, ticket, good, first.ids, route);
  if (args.receives && !good) fill_nan<Rows>(args);
  end_step(args, ticket, good);
}

}  // namespace deep_ep::cuda::internode_ll
