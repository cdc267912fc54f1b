#pragma once

#include "backend/cuda/internode_ll/announce.cuh"
#include "backend/cuda/internode_ll/count.cuh"
#include "backend/cuda/internode_ll/home.cuh"
#include "backend/cuda/internode_ll/lane_route.cuh"
#include "backend/cuda/internode_ll/stage.cuh"

// The steps of a combine, whatever its rows look like on their way home. That says `Rows`:
//   kKeepsOwn           whether a token's block sums the rows of its own rank by itself
//   x_bytes(args)       of a row of x, and of the result
//   stage(args)         by all threads: this rank's row for a message, into shared memory
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

// --- weights to the ranks of the experts -----------------------------------------------

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

/// By one warp: a token's weights to the ranks of its experts, sorted by expert; that of an expert
/// with those of later entries that repeat it. `own` is the lane's first one. False: a fault.
__device__ inline bool send_weights(const auto& args, const Ticket& ticket, std::int64_t token,
                                    float own, const Route& route) {
  const int topk = args.shape.num_topk;
  const float* weights = args.topk_weights + token * topk;
  const MessageArea& area = args.places.messages;
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
    Packet* head =
        place_at(args, ticket.packet_shift, area.head(args.comm.rank, route.to_message[to]), rank);
#pragma unroll 1
    for (int part = lane_id(); part <= topk; part += 32) {
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
    if (!kept) {
      Packet* head =
          place_at(args, ticket.packet_shift, area.head(args.comm.rank, route.message[k]), rank);
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
                                        float own, const Route& route) {
  constexpr unsigned kAll = 0xffffffff;
  constexpr int kBatch = 8;
  const int lane = lane_id();
  const int topk = args.shape.num_topk;
  const MessageArea& area = args.places.messages;
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
    if (kept || is_masked(args, to_rank)) continue;
    Packet* head = place_at(args, ticket.packet_shift,
                            area.head(args.comm.rank, route.to_message[to]), to_rank);
    if (lane <= topk && (lane == 0 || lane > count))
      send_packet(head + lane, lane == 0 ? static_cast<std::uint32_t>(token) : 0xffffffffu, 0, 0,
                  ticket.tag);
  }
  *shared_at<std::int32_t>(args.shared.num_own) = num_own;
  if (rank < 0 || is_masked(args, rank)) return true;
  const std::int32_t local = expert - route.begin[lane];
  if (ticket.keeps_own && rank == args.comm.rank)
    return keep_own(args, token, local, route.index[lane], weight, position);
  Packet* head =
      place_at(args, ticket.packet_shift, area.head(args.comm.rank, route.message[lane]), rank);
  send_packet(head + 1 + position, static_cast<std::uint32_t>(local),
              static_cast<std::uint32_t>(route.index[lane]), __float_as_uint(weight), ticket.tag);
  return true;
}

/// What a thread needs for a token's weights, loaded before anybody waits for it.
struct WeightIds {
  RouteIds ids;
  float weight;

  __device__ WeightIds(const CombineArgs& args, std::int64_t token)
      : ids(args, token),
        weight(threadIdx.x < static_cast<unsigned>(args.shape.num_topk) &&
                       token < args.num_tokens && args.topk_weights != nullptr
                   ? args.topk_weights[token * args.shape.num_topk + threadIdx.x]
                   : 0.0f) {}
};

__device__ inline bool send_all_weights(const auto& args, const Ticket& ticket, bool good,
                                        const WeightIds& first, const Route& route) {
  WeightIds loaded = first;
#pragma unroll 1
  for (std::int64_t token = first_token(); token < args.num_tokens;) {
    __syncthreads();  // the last route has been read
    if (!find_route(args, token, loaded.ids, good, route)) return false;
    if (warp_id() == 0) {
      good = (args.kFew ? send_few_weights(args, ticket, token, loaded.weight, route)
                        : send_weights(args, ticket, token, loaded.weight, route)) &&
             good;
    }
    token += gridDim.x;
    if (token < args.num_tokens) loaded = WeightIds(args, token);
  }
  return good;
}

// --- rows home -------------------------------------------------------------------------

/// By all threads, true in each: the row for one message.
template <class Rows>
__device__ bool serve(const auto& args, const Ticket& ticket, int source, std::int64_t message,
                      bool packeted) {
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
  Rows::stage(args);
  if (__syncthreads_and(holds(args, source, claim)) == 0) return false;
  send_home(args, ticket, source, message, packeted);
  return true;
}

/// Blocks take turns at the messages of all sources, those without a token of their own first.
template <class Rows>
__device__ bool send_all_home(const auto& args, const Ticket& ticket) {
  const Announced announced(args.shared, args.comm.num_ranks);
  const unsigned blocks = gridDim.x;
  const auto tokens = static_cast<unsigned>(args.num_tokens);
  unsigned turn = (blockIdx.x + blocks - (tokens + 1) % blocks) % blocks;
#pragma unroll 1
  for (int i = 1; i <= args.comm.num_ranks; ++i) {
    const int source = rank_from_own(args, i);
    if (ticket.keeps_own && source == args.comm.rank) continue;
    const auto messages = static_cast<unsigned>(
        args.is_rank_major() ? shared_at<std::int32_t>(args.shared.ranges)[source]
                             : announced.messages[source]);
    const bool packeted = args.is_rank_major() ? uses_packets(args.places.returns, messages)
                                               : announced.packeted[source] != 0;
#pragma unroll 1
    for (; turn < messages; turn += blocks) {
      // All threads alike, whatever another block masks meanwhile; and the last message's rows have
      // been read.
      if (__syncthreads_or(is_masked(args, source)) != 0) continue;
      if (!serve<Rows>(args, ticket, source, turn, packeted)) return false;
    }
    turn -= messages;
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
    const Packet* head =
        place_here(ticket.packet_shift, args.places.returns.head(rank, route.to_message[i]));
    const Arrival arrival = await_packet(args, rank, head, ticket.tag, packet);
    good = good && arrival != Arrival::kFailed;
    if (arrival == Arrival::kAbsent) route.to_rank[i] = -1;
    // acquire: pairs with the fence in send_home() of that rank.
    load_acquire_sys_b128(head);
  }
  return __syncthreads_and(good) != 0;
}

/// The plain row that came from the i-th rank of the route, or was kept.
__device__ inline const std::byte* plain_home(const auto& args, const Ticket& ticket,
                                              const Route& route, int i) {
  const MessageArea& area = args.places.returns;
  if (is_kept(args, ticket, route, i)) {
    if (!args.is_rank_major()) return shared_at<std::byte>(args.shared.own_row);
    return args.x +
           (args.comm.rank * args.shape.max_tokens + route.to_message[i]) * args.shape.row_bytes;
  }
  return place_here(ticket.plain_shift, area.plain_row(route.to_rank[i], route.to_message[i]));
}

template <class Rows>
__device__ bool receive(const auto& args, const Ticket& ticket, bool good, const RouteIds& first,
                        const Route& route) {
  __syncthreads();
  // Which ranks' rows are in packets: in expert-major as this rank chose for its own.
  const Announced announced(args.shared, args.comm.num_ranks);
  const bool packeted = uses_packets(args.places.returns, args.num_tokens);
#pragma unroll 1
  for (int i = threadIdx.x; i < args.comm.num_ranks; i += kThreads) {
    if (args.is_rank_major()) {
      good = take_announced(args, ticket, i, announced) && good;
    } else {
      announced.packeted[i] = packeted ? 1 : 0;
    }
    if (ticket.keeps_own && i == args.comm.rank) announced.packeted[i] = 0;
  }
  if (args.is_rank_major() && keeps_books()) good = all_agree(args, ticket) && good;
  // A block that has sent the weights of one token knows its route.
  const bool known = args.sends && !args.is_rank_major() && args.num_tokens <= gridDim.x;
#pragma unroll 1
  for (std::int64_t token = first_token(); token < args.num_tokens; token += gridDim.x) {
    if (known) {
      if (__syncthreads_and(good) == 0) return false;
    } else {
      const bool loaded = args.kFew && args.is_rank_major() && token == first_token();
      const RouteIds ids = loaded ? first : RouteIds(args, token);
      if (!find_route(args, token, ids, good, route)) return false;
    }
    if (!Rows::sum_token(args, ticket, token, route)) return false;
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
  // All that the first token needs is on its way before anything is waited for.
  const bool begins = args.is_rank_major() ? args.receives : args.sends;
  const WeightIds first(args, begins ? first_token() : args.num_tokens);
  const Route route(args.shared);
  const Ranges ranges(args);
  const TicketWords ticket_words(args);
  const BeginWords words(args);
  if (warp_id() == 0) clear_marks(args);
  Ticket ticket = take_ticket(args, ticket_words);
  ticket.keeps_own = Rows::kKeepsOwn && can_keep_own(args);
  ranges.keep(args);
  if (keeps_books() && warp_id() == 0) tell_consumed(args);
  if (keeps_books() && warp_id() == kWarps - 2) count_for_absent(args, ticket);
  bool good = warp_id() != kWarps - 1 || may_begin(args, ticket, words);
  if (args.sends) good = send<Rows>(args, ticket, good, first, route);
  // Without sending the threads of the block have not agreed yet.
  if (args.receives && (good || !args.sends))
    good = receive<Rows>(args, ticket, good, first.ids, route);
  if (args.receives && !good) fill_nan<Rows>(args);
  end_step(args, ticket, good);
}

/// Launches an instantiation of one of the kernels.
template <auto kKernel, Form kForm>
cudaError_t launch_combine_kernel(const CombineArgs& given, int num_sms, cudaStream_t stream) {
  const cudaError_t status = allow_shared<kKernel>(kMaxSharedBytes);
  if (status != cudaSuccess) return status;
  if (given.shared.used > kMaxSharedBytes) return cudaErrorInvalidValue;
  const Formed<CombineArgs, kForm> args{given};
  kKernel<<<num_blocks(args, num_sms), kThreads, args.shared.used, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::internode_ll
