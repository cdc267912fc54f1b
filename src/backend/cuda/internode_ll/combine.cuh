#pragma once

#include "backend/cuda/internode_ll/announce.cuh"
#include "backend/cuda/internode_ll/home.cuh"
#include "backend/cuda/internode_ll/route.cuh"

// The steps of a combine, whatever its rows look like on their way home. That says `Rows`:
//   x_bytes(args)       of a row of x, and of the result
//   send_home(...)      by all threads: this rank's row for a message of `source`, to it
//   sum_token(...)      by all threads, true in each: a token's sum
namespace deep_ep::cuda::internode_ll {

inline SharedOffsets plan_combine(const CombineArgs& args) {
  const plan::LowLatencyShape& shape = args.shape;
  SharedOffsets at;
  at.take_route(shape.num_topk);
  at.announced = at.take(std::int64_t{8} * shape.num_ranks);
  at.messages = at.take(std::int64_t{4} * shape.num_ranks);
  at.entries = at.take(std::int64_t{8} * shape.num_topk);
  at.places = at.take(static_cast<std::int64_t>(sizeof(Addend)) * shape.num_topk);
  at.num_places = at.take(4);
  return at;
}

__device__ inline bool counts_for_others() { return blockIdx.x == gridDim.x - 1; }

/// Rows of a source by a rank-major handle, which may be anything.
__device__ inline std::int32_t rows_of(const CombineArgs& args, int source) {
  const auto count = static_cast<std::int32_t>(args.layout_range[source] & 0xffffffff);
  return max(0, min(count, static_cast<std::int32_t>(args.shape.max_tokens)));
}

// --- weights to the ranks of the experts -----------------------------------------------

/// By all threads of one block: how many weights each rank gets, and how rows come home: in packets
/// or not, as the source wants it, or for rows that are summed already, as their sender does.
__device__ inline bool send_call(const CombineArgs& args, const Ticket& ticket, bool good) {
  auto* messages = shared_at<std::int32_t>(args.shared.messages);
  if (!count_all(args, good, messages, nullptr)) return false;
  for (int rank = warp_id(); rank < args.comm.num_ranks; rank += kWarps) {
    if (is_masked(args, rank)) continue;
    const std::int64_t rows = args.rank_major ? rows_of(args, rank) : args.num_tokens;
    announce(args, ticket, rank, messages[rank], uses_packets(args, args.places.returns, rows));
  }
  return true;
}

/// Of an entry that is the first of its expert: its place among those of its rank, by ascending
/// expert, and its weight with those of entries that repeat the expert.
struct SortedEntry {
  std::int32_t position;
  float weight;
};

/// By all threads.
__device__ inline void sort_entries(const CombineArgs& args, std::int64_t token,
                                    const Route& route) {
  const int topk = args.shape.num_topk;
  auto* sorted = shared_at<SortedEntry>(args.shared.entries);
  const float* weights = args.topk_weights + token * topk;
  for (int k = threadIdx.x; k < topk; k += kThreads) {
    const int rank = route.rank[k];
    const std::int32_t expert = route.expert[k];
    SortedEntry entry{0, weights[k]};
    for (int other = 0; other < topk; ++other) {
      if (route.rank[other] == rank && route.expert[other] < expert) ++entry.position;
      if (other > k && route.expert[other] == expert)
        entry.weight = plan::add(entry.weight, weights[other]);
    }
    sorted[k] = entry;
  }
  __syncthreads();
}

/// By all threads: a token's weights, sorted by expert, to all its ranks, a warp each.
__device__ inline void send_weights(const CombineArgs& args, const Ticket& ticket,
                                    std::int64_t token, const Route& route) {
  sort_entries(args, token, route);
  const auto* sorted = shared_at<SortedEntry>(args.shared.entries);
  const int topk = args.shape.num_topk;
  for (int to = warp_id(); to < *route.num_ranks; to += kWarps) {
    const int rank = route.to_rank[to];
    if (is_masked(args, rank)) continue;
    Packet* head = place_at(args, ticket.packet_shift,
                            args.places.messages.head(args.comm.rank, route.to_message[to]), rank);
    for (int part = lane_id(); part <= topk; part += 32) {
      std::uint32_t words[3] = {static_cast<std::uint32_t>(token), 0, 0};
      if (part > 0) {
        words[0] = 0xffffffffu;
        for (int k = 0; k < topk; ++k) {
          if (route.rank[k] != rank || sorted[k].position != part - 1) continue;
          words[0] = static_cast<std::uint32_t>(route.expert[k] - route.begin[k]);
          words[1] = static_cast<std::uint32_t>(route.index[k]);
          words[2] = __float_as_uint(sorted[k].weight);
        }
      }
      send_packet(head + part, words[0], words[1], words[2], ticket.tag);
    }
  }
}

__device__ inline bool send_all_weights(const CombineArgs& args, const Ticket& ticket, bool good,
                                        const Route& route) {
  for (std::int64_t token = first_token(); token < args.num_tokens; token += gridDim.x) {
    const RouteIds ids(args, token);
    __syncthreads();  // the last route has been read
    if (!find_route(args, token, ids, good, route)) return false;
    send_weights(args, ticket, token, route);
  }
  return good;
}

// --- rows home -------------------------------------------------------------------------

/// By all threads, true in each: the row for one message.
template <class Rows>
__device__ bool serve(const CombineArgs& args, const Ticket& ticket, int source,
                      std::int64_t message, bool packeted) {
  bool good = true;
  if (args.rank_major) {
    if (threadIdx.x == 0) {
      const std::int64_t row = source * args.shape.max_tokens + message;
      shared_at<Addend>(args.shared.places)[0] = {
          reinterpret_cast<const uint4*>(args.x + row * Rows::x_bytes(args)), 1.0f};
    }
  } else if (warp_id() == 0) {
    good = take_weights(args, ticket, source, message, Rows::x_bytes(args));
  }
  if (__syncthreads_and(good) == 0) return false;
  Rows::send_home(args, ticket, source, message, packeted);
  return true;
}

/// Blocks take turns at the messages of all sources, those without weights of their own first.
template <class Rows>
__device__ bool send_all_home(const CombineArgs& args, const Ticket& ticket) {
  const Announced announced(args.shared, args.comm.num_ranks);
  const unsigned blocks = gridDim.x;
  const auto tokens = static_cast<unsigned>(args.rank_major ? 0 : args.num_tokens);
  unsigned turn = (blockIdx.x + blocks - (tokens + 1) % blocks) % blocks;
  for (int source = 0; source < args.comm.num_ranks; ++source) {
    const auto messages =
        static_cast<unsigned>(args.rank_major ? rows_of(args, source) : announced.messages[source]);
    const bool packeted = args.rank_major ? uses_packets(args, args.places.returns, messages)
                                          : announced.packeted[source] != 0;
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
__device__ bool send(const CombineArgs& args, const Ticket& ticket, bool good, const Route& route) {
  if (counts_for_others() && !send_call(args, ticket, good)) return false;
  if (!args.rank_major) {
    good = send_all_weights(args, ticket, good, route);
    const Announced announced(args.shared, args.comm.num_ranks);
    for (int i = threadIdx.x; i < args.comm.num_ranks; i += kThreads)
      good = take_announced(args, ticket, i, announced) && good;
    if (keeps_books()) good = all_agree(args, ticket) && good;
  }
  if (__syncthreads_and(good) == 0) return false;
  return send_all_home<Rows>(args, ticket);
}

// --- sums ------------------------------------------------------------------------------

/// By all threads, true in each: plain rows of a token are here. Sets to_rank to -1 for ranks that
/// are absent.
__device__ inline bool await_rows(const CombineArgs& args, const Ticket& ticket,
                                  const Route& route) {
  const Announced announced(args.shared, args.comm.num_ranks);
  bool good = true;
  for (int i = threadIdx.x; i < *route.num_ranks; i += kThreads) {
    const int rank = route.to_rank[i];
    if (announced.packeted[rank] != 0) continue;
    Packet packet;
    const Packet* head =
        place_here(ticket.packet_shift, args.places.returns.head(rank, route.to_message[i]));
    const Arrival arrival = await_packet(args, rank, head, ticket.tag, packet);
    good = good && arrival != Arrival::kFailed;
    if (arrival == Arrival::kAbsent) route.to_rank[i] = -1;
    // acquire: pairs with the fence in send_home() of that rank.
    fence_acq_rel_sys();
  }
  return __syncthreads_and(good) != 0;
}

/// Calls use(group) with three units of the row that came from the i-th rank of the route, unless
/// it is absent. False: a fault.
template <class Use>
__device__ __forceinline__ bool use_home(const CombineArgs& args, const Ticket& ticket,
                                         const Route& route, int i, int number, Use&& use) {
  const Announced announced(args.shared, args.comm.num_ranks);
  const MessageArea& area = args.places.returns;
  const int rank = route.to_rank[i];
  if (rank < 0) return true;
  Group group = {};
  if (announced.packeted[rank] != 0) {
    const Packet* from = place_here(ticket.packet_shift, area.row(rank, route.to_message[i])) +
                         number * MessageArea::kGroupPackets;
    const Arrival arrival = await(args, rank, Wait::kRows, ticket.number,
                                  [&] { return take_group(from, ticket.tag, group); });
    if (arrival != Arrival::kHere) return arrival == Arrival::kAbsent;
  } else {
    const auto* from = reinterpret_cast<const uint4*>(
        place_here(ticket.plain_shift, area.plain_row(rank, route.to_message[i])));
    const auto units = static_cast<int>(area.plain_bytes / 16);
#pragma unroll
    for (int u = 0; u < Group::kUnits; ++u) {
      if (number * Group::kUnits + u < units) group.units[u] = from[number * Group::kUnits + u];
    }
  }
  use(group);
  return true;
}

template <class Rows>
__device__ bool receive(const CombineArgs& args, const Ticket& ticket, bool good,
                        const Route& route) {
  __syncthreads();
  // Which ranks' rows are in packets: in expert-major as this rank chose for its own.
  const Announced announced(args.shared, args.comm.num_ranks);
  const bool packeted = uses_packets(args, args.places.returns, args.num_tokens);
  for (int i = threadIdx.x; i < args.comm.num_ranks; i += kThreads) {
    if (args.rank_major) {
      good = take_announced(args, ticket, i, announced) && good;
    } else {
      announced.packeted[i] = packeted ? 1 : 0;
    }
  }
  if (args.rank_major && keeps_books()) good = all_agree(args, ticket) && good;
  // A block that has sent the weights of one token knows its route.
  const bool known = args.sends && !args.rank_major && args.num_tokens <= gridDim.x;
  for (std::int64_t token = first_token(); token < args.num_tokens; token += gridDim.x) {
    if (known) {
      if (__syncthreads_and(good) == 0) return false;
    } else {
      const RouteIds ids(args, token);
      if (!find_route(args, token, ids, good, route)) return false;
    }
    if (!Rows::sum_token(args, ticket, token, route)) return false;
  }
  return __syncthreads_and(good) != 0;
}

/// Rows of a call that failed.
template <class Rows>
__device__ __noinline__ void fill_nan(const CombineArgs& args) {
  const std::int64_t units = Rows::x_bytes(args) / 16;
  constexpr std::uint32_t kNan = 0x7fff7fff;
  for (std::int64_t token = first_token(); token < args.num_tokens; token += gridDim.x) {
    auto* out = reinterpret_cast<uint4*>(args.combined_x + token * Rows::x_bytes(args));
    for (std::int64_t i = threadIdx.x; i < units; i += kThreads) out[i] = {kNan, kNan, kNan, kNan};
  }
}

/// A kernel: sends, receives, or both.
template <class Rows>
__device__ void run_combine(const CombineArgs& args) {
  const Route route(args.shared);
  const Ticket ticket = take_ticket(args);
  if (keeps_books() && warp_id() == 0) tell_consumed(args);
  bool good = warp_id() != kWarps - 1 || may_begin(args, ticket);
  if (args.sends) good = send<Rows>(args, ticket, good, route);
  // Without sending the threads of the block have not agreed yet.
  if (args.receives && (good || !args.sends)) good = receive<Rows>(args, ticket, good, route);
  if (args.receives && !good) fill_nan<Rows>(args);
  end_step(args, ticket, good);
}

/// Launches an instantiation of one of the kernels.
template <auto kKernel>
cudaError_t launch_combine_kernel(const CombineArgs& args, int num_sms, cudaStream_t stream) {
  const cudaError_t status = allow_shared<kKernel>(kMaxSharedBytes);
  if (status != cudaSuccess) return status;
  if (args.shared.used > kMaxSharedBytes) return cudaErrorInvalidValue;
  kKernel<<<num_blocks(args, num_sms), kThreads, args.shared.used, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::internode_ll
