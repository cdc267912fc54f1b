#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/internode_ll/route.cuh"
#include "backend/cuda/internode_ll/stage.cuh"

namespace deep_ep::cuda::internode_ll {

namespace {

using plan::HeadEntry;
using plan::MessageArea;

/// Where a row goes: its place in recv_x, and its scales'.
struct RowPlace {
  std::byte* x;
  std::uint32_t* scales;
};

struct Shared {
  Route route;
  Announced announced;
  std::int32_t* messages;  // [R] of this rank's tokens
  std::int32_t* counts;    // [E] of this rank's tokens; received: [R, L], where they begin
  HeadEntry* entries;      // [K] of a message that has come
  RowPlace* places;        // [K] of its row
  std::int32_t* num_places;
  std::byte* row;  // one row on its way

  __host__ __device__ static Shared carve(Carver& carver, const DispatchArgs& args) {
    Shared shared;
    shared.route = Route::carve(carver, args.shape.num_topk);
    shared.announced = Announced::carve(carver, args.shape.num_ranks);
    shared.messages = carver.take<std::int32_t>(args.shape.num_ranks);
    shared.counts = carver.take<std::int32_t>(args.shape.num_experts);
    shared.entries = carver.take<HeadEntry>(args.shape.num_topk);
    shared.places = carver.take<RowPlace>(args.shape.num_topk);
    shared.num_places = carver.take<std::int32_t>(1);
    shared.row =
        carver.take<std::byte>(plan::row_groups(args.shape.row_bytes) * MessageArea::kGroupBytes);
    return shared;
  }
};

// --- sending ---------------------------------------------------------------------------

/// By all threads of one block: this rank's messages and rows for all others, counted over all its
/// tokens, and told. False in each if an id is not allowed, or `good` is false in any.
__device__ bool send_counts(const DispatchArgs& args, const Ticket& ticket, bool good,
                            Shared& shared) {
  if (!count_all(args, good, shared.messages, shared.counts)) return false;
  const int packets = args.places.count_packets;
  for (int i = threadIdx.x; i < args.comm.num_ranks * packets; i += blockDim.x) {
    const int rank = i / packets;
    if (is_masked(args, rank)) continue;
    std::uint32_t words[3];
#pragma unroll
    for (int w = 0; w < 3; ++w) {
      const int expert = i % packets * 3 + w;
      words[w] =
          expert < args.local_experts ? shared.counts[rank * args.local_experts + expert] : 0;
    }
    Packet* own = args.places.count(args.comm.rank) + i % packets;
    send_packet(place_at(args, ticket.packet_shift, own, rank), words[0], words[1], words[2],
                ticket.tag);
  }
  const bool packeted = uses_packets(args, args.places.messages, args.num_tokens);
  announce(args, ticket, shared.messages, [&](int) { return packeted; });
  return true;
}

/// By all threads: the heads of a token's messages.
__device__ void send_heads(const DispatchArgs& args, const Ticket& ticket, std::int64_t token,
                           const Route& route) {
  const int packets = 1 + args.shape.num_topk;
  for (int i = threadIdx.x; i < *route.num_ranks * packets; i += blockDim.x) {
    const int to = i / packets;
    const int part = i % packets;
    const int rank = route.to_rank[to];
    if (is_masked(args, rank)) continue;
    Packet* own = args.places.messages.head(args.comm.rank, route.to_message[to]) + part;
    Packet* place = place_at(args, ticket.packet_shift, own, rank);
    if (part == 0) {
      send_packet(place, static_cast<std::uint32_t>(token), 0, 0, ticket.tag);
      continue;
    }
    const int k = part - 1;
    const std::int32_t expert = route.expert[k];
    const bool there = expert >= 0 && route.begin[k] == rank * args.local_experts;
    const float weight = there && args.topk_weights != nullptr
                             ? args.topk_weights[token * args.shape.num_topk + k]
                             : 0.0f;
    send_packet(place, static_cast<std::uint32_t>(there ? expert - route.begin[k] : -1),
                static_cast<std::uint32_t>(route.index[k]), __float_as_uint(weight), ticket.tag);
  }
}

/// By all threads: the staged row of a token to all its ranks.
__device__ void send_row(const DispatchArgs& args, const Ticket& ticket, std::int64_t token,
                         const Shared& shared) {
  const Route& route = shared.route;
  const MessageArea& area = args.places.messages;
  if (uses_packets(args, area, args.num_tokens)) {
    send_heads(args, ticket, token, route);
    const auto groups = static_cast<int>(area.row_groups);
    for (int i = threadIdx.x; i < *route.num_ranks * groups; i += blockDim.x) {
      const int to = i / groups;
      if (is_masked(args, route.to_rank[to])) continue;
      const int number = i % groups;
      const Group group = reinterpret_cast<const Group*>(shared.row)[number];
      Packet* own =
          area.row(args.comm.rank, route.to_message[to]) + number * MessageArea::kGroupPackets;
      send_group(place_at(args, ticket.packet_shift, own, route.to_rank[to]), group, ticket.tag);
    }
    return;
  }
  const auto units = static_cast<int>(area.plain_bytes / 16);
  for (int i = threadIdx.x; i < *route.num_ranks * units; i += blockDim.x) {
    const int to = i / units;
    if (is_masked(args, route.to_rank[to])) continue;
    std::byte* own = area.plain_row(args.comm.rank, route.to_message[to]);
    auto* place =
        reinterpret_cast<uint4*>(place_at(args, ticket.plain_shift, own, route.to_rank[to]));
    place[i % units] = reinterpret_cast<const uint4*>(shared.row)[i % units];
  }
  __syncthreads();
  // release: with the heads, which are relaxed; pairs with the fence in take_message().
  fence_acq_rel_sys();
  send_heads(args, ticket, token, route);
}

template <bool kQuantize>
__device__ bool send(const DispatchArgs& args, const Ticket& ticket, bool good, Shared& shared) {
  good = await_consumed(args, ticket) && good;
  if (blockIdx.x == gridDim.x - 1) {
    if (!send_counts(args, ticket, good, shared)) return false;
    tell_consumed(args);
  }
  for (std::int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
    const RouteIds ids(args, token);
    __syncthreads();  // the last row is sent
    stage_row<kQuantize>(args, token, shared.row);
    if (!find_route(args, token, ids, good, shared.route)) return false;
    send_row(args, ticket, token, shared);
  }
  return __syncthreads_and(good) != 0;
}

// --- receiving -------------------------------------------------------------------------

/// By one thread: three counts of `source`, from packet `number` of them.
__device__ bool take_counts(const DispatchArgs& args, const Ticket& ticket, int source, int number,
                            Shared& shared) {
  const Packet* from =
      place_at(args, ticket.packet_shift, args.places.count(source) + number, args.comm.rank);
  Packet packet = {};
  const Arrival arrival = await_packet(args, source, from, ticket.tag, packet);
#pragma unroll
  for (int w = 0; w < 3; ++w) {
    const int expert = number * 3 + w;
    if (expert >= args.local_experts) continue;
    shared.counts[source * args.local_experts + expert] =
        arrival == Arrival::kHere ? static_cast<std::int32_t>(packet.words[w]) : 0;
  }
  return arrival != Arrival::kFailed;
}

/// By all threads of one block: what the result says of the counts; nothing, if there is a fault.
__device__ void write_counts(const DispatchArgs& args, const Shared& shared) {
  const int ranks = args.comm.num_ranks;
  const int groups = args.rank_major ? ranks : args.local_experts;
  for (int expert = threadIdx.x; expert < args.local_experts; expert += blockDim.x) {
    std::int32_t begin = 0;
    for (int source = 0; source < ranks; ++source) {
      const std::int32_t rows = shared.counts[source * args.local_experts + expert];
      if (!args.rank_major) {
        args.layout_range[std::int64_t{expert} * ranks + source] =
            std::int64_t{begin} << 32 | static_cast<std::uint32_t>(rows);
      }
      begin += rows;
    }
    if (!args.rank_major) args.recv_count[expert] = begin;
    if (args.cumulative_stats != nullptr) args.cumulative_stats[expert] += begin;
  }
  for (int source = threadIdx.x; args.rank_major && source < ranks; source += blockDim.x) {
    const std::int32_t rows = shared.announced.messages[source];
    args.recv_count[source] = rows;
    args.layout_range[source] =
        source * args.shape.max_tokens << 32 | static_cast<std::uint32_t>(rows);
  }
  __syncthreads();
  // A block that finds a fault writes zeros behind its report, here they are written behind a look
  // at it: whoever comes last, zeros stay.
  if (threadIdx.x == 0) fence_sc_gpu();
  if (__syncthreads_or(!may_start(args.comm)) == 0) return;
  for (int i = threadIdx.x; i < groups; i += blockDim.x) args.recv_count[i] = 0;
}

/// By all threads, true in each: how many rows each source has for each expert here, as the place
/// of its first one among the expert's rows.
__device__ bool await_counts(const DispatchArgs& args, const Ticket& ticket, bool good,
                             Shared& shared) {
  const int ranks = args.comm.num_ranks;
  const int packets = args.places.count_packets;
  for (int i = threadIdx.x; i < ranks * (packets + 1); i += blockDim.x) {
    const int number = i / ranks;
    good = (number == packets ? take_announced(args, ticket, i % ranks, shared.announced)
                              : take_counts(args, ticket, i % ranks, number, shared)) &&
           good;
  }
  if (blockIdx.x == 0) good = all_agree(args, ticket) && good;
  if (__syncthreads_and(good) == 0) return false;
  if (blockIdx.x == 0) write_counts(args, shared);
  for (int expert = threadIdx.x; expert < args.local_experts; expert += blockDim.x) {
    std::int32_t begin = 0;
    for (int source = 0; source < ranks; ++source) {
      std::int32_t& count = shared.counts[source * args.local_experts + expert];
      const std::int32_t rows = count;
      count = begin;
      begin += rows;
    }
  }
  __syncthreads();
  return true;
}

/// recv_topk_idx and recv_topk_weights at i.
__device__ void write_entry(const DispatchArgs& args, std::int64_t i, const HeadEntry& entry) {
  if (args.topk_idx.wide) {
    static_cast<std::int64_t*>(args.recv_topk_idx)[i] = entry.local_expert;
  } else {
    static_cast<std::int32_t*>(args.recv_topk_idx)[i] = entry.local_expert;
  }
  if (args.recv_topk_weights != nullptr) args.recv_topk_weights[i] = entry.weight;
}

struct Head {
  std::int32_t token;
  bool good = true;
};

/// By one warp: the head of a message, its entries into shared memory. Entries of a rank that is
/// absent are of no expert.
__device__ Head take_head(const DispatchArgs& args, const Ticket& ticket, int source,
                          std::int64_t message, Shared& shared) {
  const int packets = 1 + args.shape.num_topk;
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const Packet* from = place_at(args, ticket.packet_shift,
                                args.places.messages.head(source, message), args.comm.rank);
  Head head;
  for (int base = 0; base < packets; base += 32) {
    const int part = base + lane;
    Packet packet = {};
    Arrival arrival = Arrival::kHere;
    if (part < packets) arrival = await_packet(args, source, from + part, ticket.tag, packet);
    if (__any_sync(0xffffffff, arrival == Arrival::kFailed)) head.good = false;
    if (base == 0) head.token = __shfl_sync(0xffffffff, static_cast<int>(packet.words[0]), 0);
    if (part == 0 || part >= packets) continue;
    const bool here = arrival == Arrival::kHere;
    shared.entries[part - 1] = {here ? static_cast<std::int32_t>(packet.words[0]) : -1,
                                static_cast<std::int32_t>(packet.words[1]),
                                __uint_as_float(packet.words[2])};
  }
  __syncwarp();
  return head;
}

__device__ void set_place(const DispatchArgs& args, const Shared& shared, int i, std::int64_t row,
                          std::int32_t token) {
  args.src_info[row] = token;
  RowPlace& place = shared.places[i];
  place.x = args.recv_x + row * args.x_bytes;
  if (args.num_scales == 0) return;
  const auto rows = static_cast<std::uint32_t>(
      args.rank_major ? args.shape.max_tokens : args.comm.num_ranks * args.shape.max_tokens);
  const auto number = static_cast<std::uint32_t>(row);
  const std::int64_t* strides = args.recv_scales_strides;
  place.scales = args.recv_scales + number / rows * strides[0] + number % rows * strides[1];
}

/// By one warp: where the row goes whose head is in shared memory, and what is known of it.
__device__ void place_row(const DispatchArgs& args, int source, std::int64_t message,
                          std::int32_t token, Shared& shared) {
  const int topk = args.shape.num_topk;
  const std::int64_t max_rows = args.comm.num_ranks * args.shape.max_tokens;
  const std::int64_t own = source * args.shape.max_tokens + message;
  int found = 0;
  for (int base = 0; base < topk; base += 32) {
    const int k = base + static_cast<int>(threadIdx.x % 32);
    const HeadEntry entry = k < topk ? shared.entries[k] : HeadEntry{-1, 0, 0.0f};
    std::int64_t row = -1;
    if (args.rank_major) {
      if (k == 0) row = own;
      if (k < topk) write_entry(args, own * topk + k, entry);
    } else if (entry.local_expert >= 0 && entry.local_expert < args.local_experts) {
      bool first = true;
      for (int before = 0; before < k; ++before)
        first = first && shared.entries[before].local_expert != entry.local_expert;
      const std::int64_t index =
          std::int64_t{shared.counts[source * args.local_experts + entry.local_expert]} +
          entry.index;
      // Beyond are only rows of another shape.
      if (first && index >= 0 && index < max_rows) row = entry.local_expert * max_rows + index;
    }
    const unsigned placed = __ballot_sync(0xffffffff, row >= 0);
    const unsigned lower = (1u << threadIdx.x % 32) - 1;
    if (row >= 0) set_place(args, shared, found + __popc(placed & lower), row, token);
    found += __popc(placed);
  }
  if (threadIdx.x % 32 == 0) *shared.num_places = found;
}

/// One unit of 16 bytes of a row, to all its places.
__device__ void store_unit(const DispatchArgs& args, const Shared& shared, int unit,
                           const uint4& value) {
  const auto byte = static_cast<std::uint32_t>(unit) * 16;
  const auto x_bytes = static_cast<std::uint32_t>(args.x_bytes);
  const int places = *shared.num_places;
  if (byte < x_bytes) {
    for (int i = 0; i < places; ++i) *reinterpret_cast<uint4*>(shared.places[i].x + byte) = value;
    return;
  }
  const std::uint32_t words[4] = {value.x, value.y, value.z, value.w};
  const auto first = static_cast<int>((byte - x_bytes) / 4);
  for (int i = 0; i < places; ++i) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (first + w < args.num_scales)
        shared.places[i].scales[(first + w) * args.recv_scales_strides[2]] = words[w];
    }
  }
}

/// By all threads, true in each: one message to its places.
__device__ bool take_message(const DispatchArgs& args, const Ticket& ticket, int source,
                             std::int64_t message, Shared& shared) {
  const MessageArea& area = args.places.messages;
  const bool packeted = shared.announced.packeted[source] != 0 && message < area.max_packeted;
  bool good = true;
  if (threadIdx.x < 32) {
    const Head head = take_head(args, ticket, source, message, shared);
    good = head.good;
    // acquire: pairs with the fence in send_row() of the source.
    if (!packeted) fence_acq_rel_sys();
    place_row(args, source, message, head.token, shared);
  }
  const Packet* from =
      place_at(args, ticket.packet_shift, area.row(source, message), args.comm.rank);
  Group group;
  const auto take = [&](std::int64_t number) {
    return await(args, source, Wait::kRows, ticket.number, [&] {
             return take_group(from + number * MessageArea::kGroupPackets, ticket.tag, group);
           }) != Arrival::kFailed;
  };
  // The first groups are on their way while the head is looked at.
  if (packeted && threadIdx.x < area.row_groups) good = take(threadIdx.x) && good;
  if (__syncthreads_and(good) == 0) return false;
  if (packeted) {
    for (std::int64_t i = threadIdx.x; i < area.row_groups; i += blockDim.x) {
      if (i >= blockDim.x && !take(i)) good = false;
#pragma unroll
      for (int u = 0; u < Group::kUnits; ++u)
        store_unit(args, shared, static_cast<int>(i) * Group::kUnits + u, group.units[u]);
    }
  } else {
    const auto* plain = reinterpret_cast<const uint4*>(
        place_at(args, ticket.plain_shift, area.plain_row(source, message), args.comm.rank));
    const auto units = static_cast<int>(area.plain_bytes / 16);
    for (int i = threadIdx.x; i < units; i += blockDim.x) store_unit(args, shared, i, plain[i]);
  }
  return __syncthreads_and(good) != 0;
}

/// What a rank-major result says of rows that did not come.
__device__ void fill_unused(const DispatchArgs& args, const Shared& shared) {
  const auto entries = static_cast<std::uint32_t>(args.shape.max_tokens * args.shape.num_topk);
  const std::uint32_t threads = gridDim.x * blockDim.x;
  for (int source = 0; source < args.comm.num_ranks; ++source) {
    const std::uint32_t used = shared.announced.messages[source] * args.shape.num_topk;
    for (std::uint32_t i = used + blockIdx.x * blockDim.x + threadIdx.x; i < entries; i += threads)
      write_entry(args, std::int64_t{source} * entries + i, {-1, 0, 0.0f});
  }
}

__device__ bool receive(const DispatchArgs& args, const Ticket& ticket, bool good, Shared& shared) {
  __syncthreads();
  if (!await_counts(args, ticket, good, shared)) return false;
  if (args.rank_major) fill_unused(args, shared);
  // Blocks without a token of their own go first.
  const unsigned blocks = gridDim.x;
  const auto tokens = static_cast<unsigned>(args.sends ? args.num_tokens : 0);
  unsigned turn = (blockIdx.x + blocks - tokens % blocks) % blocks;
  for (int source = 0; source < args.comm.num_ranks; ++source) {
    const auto messages = static_cast<unsigned>(shared.announced.messages[source]);
    for (; turn < messages; turn += blocks) {
      if (!take_message(args, ticket, source, turn, shared)) return false;
    }
    turn -= messages;
  }
  return true;
}

/// Sends, receives, or both.
template <bool kQuantize>
__global__ void __launch_bounds__(kThreads, 1) dispatch(const __grid_constant__ DispatchArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  Carver carver(memory);
  Shared shared = Shared::carve(carver, args);
  const Ticket ticket = take_ticket(args);
  bool good = may_begin(args, ticket);
  if (args.sends) good = send<kQuantize>(args, ticket, good, shared);
  if (!args.sends && blockIdx.x == gridDim.x - 1) tell_consumed(args);
  // Without sending the threads of the block have not agreed yet.
  if (args.receives && (good || !args.sends)) good = receive(args, ticket, good, shared);
  end_step(args, ticket, good);
  if (good || !args.receives) return;
  // Nothing has come, as far as anybody may rely on it; see write_counts().
  fence_sc_gpu();
  const int groups = args.rank_major ? args.comm.num_ranks : args.local_experts;
  for (int i = threadIdx.x; i < groups; i += blockDim.x) args.recv_count[i] = 0;
}

template <bool kQuantize>
cudaError_t launch(const DispatchArgs& args, int num_blocks, cudaStream_t stream) {
  Carver carver(nullptr);
  (void)Shared::carve(carver, args);
  const auto bytes = static_cast<int>(carver.used());
  const cudaError_t status = allow_shared<dispatch<kQuantize>>(kMaxSharedBytes);
  if (status != cudaSuccess) return status;
  if (bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  dispatch<kQuantize><<<num_blocks, kThreads, static_cast<std::size_t>(bytes), stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream) {
  return args.quantize ? launch<true>(args, num_sms, stream) : launch<false>(args, num_sms, stream);
}

cudaError_t load_dispatch() {
  const cudaError_t status = load<dispatch<false>>();
  return status == cudaSuccess ? load<dispatch<true>>() : status;
}

}  // namespace deep_ep::cuda::internode_ll
