#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/sums.cuh"
#include "backend/cuda/internode_ll/route.cuh"

namespace deep_ep::cuda::internode_ll {

namespace {

using plan::HeadEntry;
using plan::MessageArea;

struct Shared {
  Route route;
  std::int32_t* position;  // [K] of an entry among those of its rank, by ascending expert
  float* weight;           // [K] of an entry and those that repeat its expert
  Announced announced;
  std::int32_t* messages;  // [R]
  HeadEntry* entries;      // [K] of a message that has come
  std::int64_t* rows;      // [K] of x that it sums
  std::int32_t* num_rows;

  __host__ __device__ static Shared carve(Carver& carver, const CombineArgs& args) {
    Shared shared;
    shared.route = Route::carve(carver, args.shape.num_topk);
    shared.position = carver.take<std::int32_t>(args.shape.num_topk);
    shared.weight = carver.take<float>(args.shape.num_topk);
    shared.announced = Announced::carve(carver, args.shape.num_ranks);
    shared.messages = carver.take<std::int32_t>(args.shape.num_ranks);
    shared.entries = carver.take<HeadEntry>(args.shape.num_topk);
    shared.rows = carver.take<std::int64_t>(args.shape.num_topk);
    shared.num_rows = carver.take<std::int32_t>(1);
    return shared;
  }
};

__device__ std::int32_t range_count(std::int64_t range) {
  return static_cast<std::int32_t>(range & 0xffffffff);
}
__device__ std::int64_t range_begin(std::int64_t range) { return range >> 32; }

// --- weights to the ranks of the experts -----------------------------------------------

/// By all threads of one block: how many weights each rank gets, and how rows come home: in packets
/// or not, as the source wants it, or for rows that are summed already, as their sender does.
__device__ bool send_call(const CombineArgs& args, const Ticket& ticket, bool good,
                          Shared& shared) {
  if (!count_all(args, good, shared.messages, nullptr)) return false;
  announce(args, ticket, shared.messages, [&](int rank) {
    return uses_packets(args, args.places.returns,
                        args.rank_major ? range_count(args.layout_range[rank]) : args.num_tokens);
  });
  return true;
}

/// By all threads: for each entry that is the first of its expert, its place and its weight.
__device__ void sort_entries(const CombineArgs& args, std::int64_t token, Shared& shared) {
  const Route& route = shared.route;
  const int topk = args.shape.num_topk;
  for (int k = threadIdx.x; k < topk; k += blockDim.x) {
    const int rank = route.rank[k];
    const std::int32_t expert = route.expert[k];
    int position = 0;
    float weight = args.topk_weights[token * topk + k];
    for (int other = 0; other < topk; ++other) {
      if (route.rank[other] == rank && route.expert[other] < expert) ++position;
      if (other > k && route.expert[other] == expert)
        weight = plan::add(weight, args.topk_weights[token * topk + other]);
    }
    shared.position[k] = position;
    shared.weight[k] = weight;
  }
  __syncthreads();
}

/// By all threads: a token's weights, sorted by expert, to all its ranks.
__device__ void send_weights(const CombineArgs& args, const Ticket& ticket, std::int64_t token,
                             Shared& shared) {
  sort_entries(args, token, shared);
  const Route& route = shared.route;
  const int topk = args.shape.num_topk;
  const int packets = 1 + topk;
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
    int k = 0;
    while (k < topk && (route.rank[k] != rank || shared.position[k] != part - 1)) ++k;
    if (k == topk) {
      send_packet(place, 0xffffffffu, 0, 0, ticket.tag);
    } else {
      send_packet(place, static_cast<std::uint32_t>(route.expert[k] - route.begin[k]),
                  static_cast<std::uint32_t>(route.index[k]), __float_as_uint(shared.weight[k]),
                  ticket.tag);
    }
  }
}

__device__ bool send_all_weights(const CombineArgs& args, const Ticket& ticket, bool good,
                                 Shared& shared) {
  for (std::int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
    const RouteIds ids(args, token);
    if (!find_route(args, token, ids, good, shared.route)) return false;
    send_weights(args, ticket, token, shared);
  }
  return good;
}

// --- rows home -------------------------------------------------------------------------

/// By one warp: the entries of a message, and the rows that they name, into shared memory.
__device__ bool take_weights(const CombineArgs& args, const Ticket& ticket, int source,
                             std::int64_t message, Shared& shared) {
  const int packets = 1 + args.shape.num_topk;
  const std::int64_t max_rows = args.comm.num_ranks * args.shape.max_tokens;
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const Packet* head = place_at(args, ticket.packet_shift,
                                args.places.messages.head(source, message), args.comm.rank);
  bool good = true;
  int found = 0;
  std::int32_t token = 0;
  for (int base = 0; base < packets && good; base += 32) {
    const int part = base + lane;
    Packet packet = {};
    Arrival arrival = Arrival::kHere;
    if (part < packets) arrival = await_packet(args, source, head + part, ticket.tag, packet);
    good = !__any_sync(0xffffffff, arrival == Arrival::kFailed);
    if (base == 0) token = __shfl_sync(0xffffffff, static_cast<int>(packet.words[0]), 0);
    const auto expert = static_cast<std::int32_t>(packet.words[0]);
    const bool entry = part > 0 && part < packets && arrival == Arrival::kHere && expert >= 0 &&
                       expert < args.local_experts;
    if (entry) {
      const std::int64_t range =
          args.layout_range[std::int64_t{expert} * args.comm.num_ranks + source];
      const std::int64_t row = range_begin(range) + static_cast<std::int32_t>(packet.words[1]);
      const std::int64_t slot = expert * max_rows + row;
      const bool inside = row >= 0 && row < max_rows;
      const std::int32_t of = inside ? args.src_info[slot] : -1;
      if (of != token) {
        Report report;
        report.finding = Finding::kOtherRouting;
        report.code = kInvalidArgumentCode;
        report.rank = source;
        report.values[0] = token;
        report.values[1] = expert;
        report.values[2] = row;
        report.values[3] = of;
        raise(args.comm, report);
        good = false;
      }
      shared.rows[part - 1] = slot;
      shared.entries[part - 1].weight = __uint_as_float(packet.words[2]);
    }
    found += __popc(__ballot_sync(0xffffffff, entry));
    good = __all_sync(0xffffffff, good) != 0;
  }
  if (lane == 0) *shared.num_rows = found;
  return good;
}

/// Eight values of bfloat16, summed with weights.
struct Sum8 {
  float sums[8] = {};

  __device__ void add(const uint4& bytes, float weight) {
    const std::uint32_t pairs[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[2 * i] = plan::accumulate(sums[2 * i], weight, __uint_as_float(pairs[i] << 16));
      sums[2 * i + 1] =
          plan::accumulate(sums[2 * i + 1], weight, __uint_as_float(pairs[i] & 0xffff0000u));
    }
  }
  __device__ uint4 round() const {
    uint4 bytes;
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) narrow({sums[2 * i], sums[2 * i + 1]}, pairs[i]);
    return bytes;
  }
};

/// One unit of 16 bytes of what goes home.
__device__ uint4 partial(const CombineArgs& args, const Shared& shared, int unit) {
  if (args.rank_major) {
    return *reinterpret_cast<const uint4*>(args.x + shared.rows[0] * args.shape.row_bytes +
                                           std::int64_t{unit} * 16);
  }
  Sum8 sum;
  for (int i = 0; i < *shared.num_rows; ++i) {
    sum.add(*reinterpret_cast<const uint4*>(args.x + shared.rows[i] * args.shape.row_bytes +
                                            std::int64_t{unit} * 16),
            shared.entries[i].weight);
  }
  return sum.round();
}

/// By all threads: this rank's row for a message of `source`, to it.
__device__ void send_home(const CombineArgs& args, const Ticket& ticket, int source,
                          std::int64_t message, bool packeted, const Shared& shared) {
  const MessageArea& area = args.places.returns;
  const int rank = args.comm.rank;
  const auto units = static_cast<int>(area.plain_bytes / 16);
  if (packeted) {
    for (std::int64_t i = threadIdx.x; i < area.row_groups; i += blockDim.x) {
      Group group = {};
#pragma unroll
      for (int u = 0; u < Group::kUnits; ++u) {
        const int unit = static_cast<int>(i) * Group::kUnits + u;
        if (unit < units) group.units[u] = partial(args, shared, unit);
      }
      Packet* own = area.row(rank, message) + i * MessageArea::kGroupPackets;
      send_group(place_at(args, ticket.packet_shift, own, source), group, ticket.tag);
    }
    return;
  }
  auto* place = reinterpret_cast<uint4*>(
      place_at(args, ticket.plain_shift, area.plain_row(rank, message), source));
  for (int i = threadIdx.x; i < units; i += blockDim.x) place[i] = partial(args, shared, i);
  __syncthreads();
  if (threadIdx.x != 0) return;
  // release: with the head, which is relaxed; pairs with the fence in await_rows() of the source.
  fence_acq_rel_sys();
  send_packet(place_at(args, ticket.packet_shift, area.head(rank, message), source), 0, 0, 0,
              ticket.tag);
}

/// Blocks take turns at the messages of all sources.
template <class Take>
__device__ bool for_messages(const CombineArgs& args, const Shared& shared, Take&& take) {
  const auto blocks = static_cast<std::int64_t>(gridDim.x);
  std::int64_t passed = 0;
  for (int source = 0; source < args.comm.num_ranks; ++source) {
    const std::int64_t messages = args.rank_major ? range_count(args.layout_range[source])
                                                  : shared.announced.messages[source];
    const std::int64_t skip = (blockIdx.x + blocks - passed % blocks) % blocks;
    for (std::int64_t message = skip; message < messages; message += blocks) {
      if (!is_masked(args, source) && !take(source, message)) return false;
    }
    passed += messages;
  }
  return true;
}

__device__ bool send_all_home(const CombineArgs& args, const Ticket& ticket, Shared& shared) {
  return for_messages(args, shared, [&](int source, std::int64_t message) {
    __syncthreads();  // the last message's rows have been read
    bool good = true;
    bool packeted = false;
    if (args.rank_major) {
      if (threadIdx.x == 0) {
        shared.rows[0] = source * args.shape.max_tokens + message;
        *shared.num_rows = 1;
      }
      packeted = uses_packets(args, args.places.returns, range_count(args.layout_range[source]));
    } else {
      if (threadIdx.x < 32) good = take_weights(args, ticket, source, message, shared);
      packeted = shared.announced.packeted[source] != 0;
    }
    if (__syncthreads_and(good) == 0) return false;
    send_home(args, ticket, source, message, packeted, shared);
    return true;
  });
}

__device__ bool send(const CombineArgs& args, const Ticket& ticket, bool good, Shared& shared) {
  good = await_consumed(args, ticket) && good;
  if (blockIdx.x == gridDim.x - 1) {
    if (!send_call(args, ticket, good, shared)) return false;
    tell_consumed(args);
  }
  if (!args.rank_major) {
    good = send_all_weights(args, ticket, good, shared);
    for (int i = threadIdx.x; i < args.comm.num_ranks; i += blockDim.x)
      good = take_announced(args, ticket, i, shared.announced) && good;
    if (blockIdx.x == 0) good = all_agree(args, ticket) && good;
  }
  if (__syncthreads_and(good) == 0) return false;
  return send_all_home(args, ticket, shared);
}

// --- sums ------------------------------------------------------------------------------

/// By all threads, true in each: plain rows of a token are here. Sets to_rank to -1 for ranks that
/// are absent.
__device__ bool await_rows(const CombineArgs& args, const Ticket& ticket, const Shared& shared) {
  const Route& route = shared.route;
  bool good = true;
  for (int i = threadIdx.x; i < *route.num_ranks; i += blockDim.x) {
    const int rank = route.to_rank[i];
    if (shared.announced.packeted[rank] != 0) continue;
    Packet packet;
    const Packet* head =
        place_at(args, ticket.packet_shift, args.places.returns.head(rank, route.to_message[i]),
                 args.comm.rank);
    const Arrival arrival = await_packet(args, rank, head, ticket.tag, packet);
    good = good && arrival != Arrival::kFailed;
    if (arrival == Arrival::kAbsent) route.to_rank[i] = -1;
    // acquire: pairs with the fence in send_home() of that rank.
    fence_acq_rel_sys();
  }
  return __syncthreads_and(good) != 0;
}

/// Adds one group of the row that came from the i-th rank of the route. False: a fault.
__device__ bool add_group(const CombineArgs& args, const Ticket& ticket, const Shared& shared,
                          int i, int number, Sum16<__nv_bfloat162>* sums) {
  const Route& route = shared.route;
  const MessageArea& area = args.places.returns;
  const int rank = route.to_rank[i];
  if (rank < 0) return true;
  Group group = {};
  if (shared.announced.packeted[rank] != 0) {
    const Packet* from =
        place_at(args, ticket.packet_shift, area.row(rank, route.to_message[i]), args.comm.rank) +
        number * MessageArea::kGroupPackets;
    const Arrival arrival = await(args, rank, Wait::kRows, ticket.number,
                                  [&] { return take_group(from, ticket.tag, group); });
    if (arrival != Arrival::kHere) return arrival == Arrival::kAbsent;
  } else {
    const auto* from = reinterpret_cast<const uint4*>(place_at(
        args, ticket.plain_shift, area.plain_row(rank, route.to_message[i]), args.comm.rank));
    const auto units = static_cast<int>(area.plain_bytes / 16);
#pragma unroll
    for (int u = 0; u < Group::kUnits; ++u) {
      if (number * Group::kUnits + u < units) group.units[u] = from[number * Group::kUnits + u];
    }
  }
#pragma unroll
  for (int u = 0; u < Group::kUnits; ++u) sums[u].add(group.units[u]);
  return true;
}

__device__ bool sum_token(const CombineArgs& args, const Ticket& ticket, std::int64_t token,
                          const Shared& shared) {
  if (!await_rows(args, ticket, shared)) return false;
  const int ranks = *shared.route.num_ranks;
  const auto units = static_cast<int>(args.shape.row_bytes / 16);
  auto* out = reinterpret_cast<uint4*>(args.combined_x + token * args.shape.row_bytes);
  bool good = true;
  for (int number = threadIdx.x; number < args.places.returns.row_groups; number += blockDim.x) {
    Sum16<__nv_bfloat162> sums[Group::kUnits];
    for (int i = 0; i < ranks && good; ++i) good = add_group(args, ticket, shared, i, number, sums);
#pragma unroll
    for (int u = 0; u < Group::kUnits; ++u) {
      const int unit = number * Group::kUnits + u;
      if (unit < units) out[unit] = sums[u].round();
    }
  }
  return __syncthreads_and(good) != 0;
}

__device__ bool receive(const CombineArgs& args, const Ticket& ticket, bool good, Shared& shared) {
  __syncthreads();
  // Which ranks' rows are in packets: in expert-major as this rank chose for its own.
  const bool packeted = uses_packets(args, args.places.returns, args.num_tokens);
  for (int i = threadIdx.x; i < args.comm.num_ranks; i += blockDim.x) {
    if (args.rank_major) {
      good = take_announced(args, ticket, i, shared.announced) && good;
    } else {
      shared.announced.packeted[i] = packeted ? 1 : 0;
    }
  }
  if (args.rank_major && blockIdx.x == 0) good = all_agree(args, ticket) && good;
  // A block that has sent the weights of one token knows its route.
  const bool known = args.sends && !args.rank_major && args.num_tokens <= gridDim.x;
  for (std::int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
    if (known) {
      if (__syncthreads_and(good) == 0) return false;
    } else {
      const RouteIds ids(args, token);
      if (!find_route(args, token, ids, good, shared.route)) return false;
    }
    if (!sum_token(args, ticket, token, shared)) return false;
  }
  return __syncthreads_and(good) != 0;
}

/// Rows of a call that failed.
__device__ void fill_nan(const CombineArgs& args) {
  const std::int64_t units = args.shape.row_bytes / 16;
  constexpr std::uint32_t kNan = 0x7fff7fff;
  for (std::int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
    auto* out = reinterpret_cast<uint4*>(args.combined_x + token * args.shape.row_bytes);
    for (std::int64_t i = threadIdx.x; i < units; i += blockDim.x)
      out[i] = {kNan, kNan, kNan, kNan};
  }
}

/// Sends, receives, or both.
__global__ void __launch_bounds__(kThreads, 1) combine(const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  Carver carver(memory);
  Shared shared = Shared::carve(carver, args);
  const Ticket ticket = take_ticket(args);
  bool good = may_begin(args, ticket);
  if (args.sends) good = send(args, ticket, good, shared);
  if (!args.sends && blockIdx.x == gridDim.x - 1) tell_consumed(args);
  // Without sending the threads of the block have not agreed yet.
  if (args.receives && (good || !args.sends)) good = receive(args, ticket, good, shared);
  if (args.receives && !good) fill_nan(args);
  end_step(args, ticket, good);
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, int num_sms, cudaStream_t stream) {
  Carver carver(nullptr);
  (void)Shared::carve(carver, args);
  const auto bytes = static_cast<int>(carver.used());
  const cudaError_t status = allow_shared<combine>(kMaxSharedBytes);
  if (status != cudaSuccess) return status;
  if (bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  combine<<<num_sms, kThreads, static_cast<std::size_t>(bytes), stream>>>(args);
  return cudaGetLastError();
}

cudaError_t load_combine() { return load<combine>(); }

}  // namespace deep_ep::cuda::internode_ll
