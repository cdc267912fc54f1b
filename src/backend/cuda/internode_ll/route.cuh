#pragma once

#include "backend/cuda/internode_ll/ticket.cuh"

// Where one token goes: found by a block from the ids of all tokens before it, so that sending
// needs no kernel ahead of it and no exchange between blocks.
namespace deep_ep::cuda::internode_ll {

/// In shared memory, K entries an array.
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

  __host__ __device__ static Route carve(Carver& carver, int num_topk) {
    Route route;
    for (std::int32_t** array : {&route.expert, &route.begin, &route.index, &route.message,
                                 &route.rank, &route.to_rank, &route.to_message}) {
      *array = carver.take<std::int32_t>(num_topk);
    }
    route.num_ranks = carver.take<std::int32_t>(1);
    return route;
  }
};

/// A few ids of one token, loaded before the first is looked at.
struct SomeIds {
  static constexpr int kSize = 8;
  std::int32_t ids[kSize];  // -1: none
  int bad = -1;             // the first that is not allowed
};

__device__ inline SomeIds load_ids(const StepArgs& args, std::int64_t token, int from) {
  const int topk = args.shape.num_topk;
  std::int64_t ids[SomeIds::kSize];
#pragma unroll
  for (int i = 0; i < SomeIds::kSize; ++i) {
    const bool there = token < args.num_tokens && from + i < topk;
    ids[i] = there ? args.topk_idx[token * topk + from + i] : -1;
  }
  SomeIds some;
#pragma unroll
  for (int i = 0; i < SomeIds::kSize; ++i) {
    const bool allowed = ids[i] >= -1 && ids[i] < args.shape.num_experts;
    if (!allowed && some.bad < 0) some.bad = i;
    some.ids[i] = allowed ? static_cast<std::int32_t>(ids[i]) : -1;
  }
  return some;
}

/// Reports an id that is not allowed; false then.
__device__ inline bool check_ids(const StepArgs& args, std::int64_t token, int from,
                                 const SomeIds& some) {
  if (some.bad < 0) return true;
  const int k = from + some.bad;
  raise_invalid(args.comm, Finding::kBadExpert, token, k,
                args.topk_idx[token * args.shape.num_topk + k], args.shape.num_experts);
  return false;
}

/// Bit i: some id is target from + i's expert, or is of its rank.
struct Matches {
  std::uint32_t experts = 0;
  std::uint32_t ranks = 0;
};

__device__ inline void match(const StepArgs& args, const Route& route, int from, int targets,
                             const SomeIds& some, Matches& matches) {
  const auto local_experts = static_cast<std::uint32_t>(args.local_experts);
  for (int i = 0; i < targets; ++i) {
    const std::int32_t expert = route.expert[from + i];
    const auto begin = static_cast<std::uint32_t>(route.begin[from + i]);
    bool same_expert = false;
    bool same_rank = false;
#pragma unroll
    for (const std::int32_t id : some.ids) {
      same_expert = same_expert || id == expert;
      same_rank = same_rank || (id >= 0 && static_cast<std::uint32_t>(id) - begin < local_experts);
    }
    if (expert < 0) continue;
    matches.experts |= std::uint32_t{same_expert} << i;
    matches.ranks |= std::uint32_t{same_rank} << i;
  }
}

/// By a warp: for the targets [from, from + 32) of `token`, adds how many tokens before it name
/// their expert, and go to its rank. Looks at the ids of all tokens, since all are checked before
/// anything is sent. `first` are the ids of the thread's first token.
__device__ inline bool count_before(const StepArgs& args, const Route& route, std::int64_t token,
                                    int from, const SomeIds& first) {
  const int topk = args.shape.num_topk;
  const int targets = topk - from < 32 ? topk - from : 32;
  const auto lane = static_cast<int>(threadIdx.x % 32);
  int same_expert = 0;
  int same_rank = 0;
  bool good = true;
  for (std::int64_t base = threadIdx.x - lane; base < args.num_tokens; base += blockDim.x) {
    const std::int64_t other = base + lane;
    Matches matches;
    for (int k = 0; k < topk; k += SomeIds::kSize) {
      const bool loaded = k == 0 && base < blockDim.x;
      const SomeIds some = loaded ? first : load_ids(args, other, k);
      good = good && check_ids(args, other, k, some);
      if (other < token) match(args, route, from, targets, some, matches);
    }
    if (base >= token) continue;  // of the whole warp
    for (int i = 0; i < targets; ++i) {
      const int experts = __popc(__ballot_sync(0xffffffff, (matches.experts >> i & 1) != 0));
      const int ranks = __popc(__ballot_sync(0xffffffff, (matches.ranks >> i & 1) != 0));
      if (lane != i) continue;
      same_expert += experts;
      same_rank += ranks;
    }
  }
  if (same_expert != 0) atomicAdd(&route.index[from + lane], same_expert);
  if (same_rank != 0) atomicAdd(&route.message[from + lane], same_rank);
  return good;
}

/// A set of ranks.
struct RankSet {
  static constexpr int kWords = (kMaxRanks + 31) / 32;
  std::uint32_t words[kWords] = {};

  /// By a warp: adds every lane's rank, if it is not negative.
  __device__ void add(int rank) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
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
__device__ inline void list_ranks(const Route& route, int topk) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  RankSet all;
  for (int base = 0; base < topk; base += 32)
    all.add(base + lane < topk ? route.rank[base + lane] : -1);
  RankSet before;
  for (int base = 0; base < topk; base += 32) {
    const int k = base + lane;
    const int rank = k < topk ? route.rank[k] : -1;
    const std::int32_t expert = k < topk ? route.expert[k] : -1;
    const auto lower = (1u << lane) - 1;
    const bool first_of_rank =
        (__match_any_sync(0xffffffff, rank) & lower) == 0 && !before.has(rank);
    bool first_of_expert = (__match_any_sync(0xffffffff, expert) & lower) == 0;
    for (int other = 0; other < base && first_of_expert; ++other)
      first_of_expert = route.expert[other] != expert;
    before.add(rank);
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
    return k < topk ? static_cast<std::int32_t>(args.topk_idx[token * topk + k]) : -1;
  }
};

/// By all threads of a block: where `token` goes. False in each if an id of any token is not
/// allowed, or `good` is false in any.
__device__ inline bool find_route(const StepArgs& args, std::int64_t token, const RouteIds& ids,
                                  bool good, const Route& route) {
  const int topk = args.shape.num_topk;
  __syncthreads();  // the last route has been read
  for (int k = threadIdx.x; k < topk; k += blockDim.x) {
    const std::int32_t expert =
        k < blockDim.x ? ids.own : RouteIds::load_own(args, token, static_cast<unsigned>(k));
    const int rank = expert >= 0 && expert < args.shape.num_experts ? args.rank_of(expert) : -1;
    route.expert[k] = expert;
    route.rank[k] = rank;
    route.begin[k] = rank * args.local_experts;
    route.index[k] = 0;
    route.message[k] = 0;
  }
  __syncthreads();
  for (int from = 0; from < topk; from += 32)
    good = count_before(args, route, token, from, ids.first) && good;
  if (__syncthreads_and(good) == 0) return false;
  if (threadIdx.x < 32) list_ranks(route, topk);
  __syncthreads();
  return true;
}

/// By all threads of a block: over all tokens, the messages for each rank, and if `rows` is not
/// null the rows for each expert; both in shared memory, filled from zero. False in each if an id
/// is not allowed, or `good` is false in any.
__device__ inline bool count_all(const StepArgs& args, bool good, std::int32_t* messages,
                                 std::int32_t* rows) {
  const int topk = args.shape.num_topk;
  SomeIds some = load_ids(args, threadIdx.x, 0);
  for (int i = threadIdx.x; i < args.comm.num_ranks; i += blockDim.x) messages[i] = 0;
  for (int i = threadIdx.x; rows != nullptr && i < args.shape.num_experts; i += blockDim.x)
    rows[i] = 0;
  __syncthreads();
  for (std::int64_t token = threadIdx.x; token < args.num_tokens; token += blockDim.x) {
    std::uint32_t ranks[RankSet::kWords] = {};
    for (int from = 0; from < topk; from += SomeIds::kSize) {
      if (from > 0 || token >= blockDim.x) some = load_ids(args, token, from);
      good = check_ids(args, token, from, some) && good;
#pragma unroll
      for (int i = 0; i < SomeIds::kSize; ++i) {
        const std::int32_t expert = some.ids[i];
        if (expert < 0) continue;
        const int rank = args.rank_of(expert);
#pragma unroll
        for (int w = 0; w < RankSet::kWords; ++w) {
          if (rank / 32 != w || (ranks[w] >> rank % 32 & 1) != 0) continue;
          ranks[w] |= 1u << rank % 32;
          atomicAdd(&messages[rank], 1);
        }
        if (rows == nullptr) continue;
        bool repeated = false;
#pragma unroll
        for (int before = 0; before < i; ++before)
          repeated = repeated || some.ids[before] == expert;
        for (int before = 0; before < from && !repeated; ++before)
          repeated = args.topk_idx[token * topk + before] == expert;
        if (!repeated) atomicAdd(&rows[expert], 1);
      }
    }
  }
  return __syncthreads_and(good) != 0;
}

// --- what a source says ahead ----------------------------------------------------------

constexpr int kRecordWords = offsetof(protocol::CallRecord, num_tokens) / 4;
static_assert((kRecordWords + 2) / 3 + 1 == plan::kCallPackets, "what ranks compare, in packets");

/// In shared memory.
struct Announced {
  std::int32_t* messages;   // [R] for this rank, by source
  std::uint32_t* packeted;  // [R] 1: its rows travel in packets

  __host__ __device__ static Announced carve(Carver& carver, int num_ranks) {
    Announced announced;
    announced.messages = carver.take<std::int32_t>(num_ranks);
    announced.packeted = carver.take<std::uint32_t>(num_ranks);
    return announced;
  }
};

/// By all threads of one block: how many messages each rank gets (`messages` [R], in shared
/// memory), whether their rows are in packets, and what this rank called with.
template <class Packeted>
__device__ void announce(const StepArgs& args, const Ticket& ticket, const std::int32_t* messages,
                         Packeted&& packeted) {
  const Comm& comm = args.comm;
  const auto* record = reinterpret_cast<const std::uint32_t*>(&comm.record);
  for (int i = threadIdx.x; i < comm.num_ranks * plan::kCallPackets; i += blockDim.x) {
    const int rank = i / plan::kCallPackets;
    const int part = i % plan::kCallPackets;
    if (is_masked(args, rank)) continue;
    Packet* to = place_at(args, ticket.packet_shift, args.places.call(comm.rank) + part, rank);
    if (part == 0) {
      send_packet(to, static_cast<std::uint32_t>(messages[rank]), packeted(rank) ? 1 : 0,
                  static_cast<std::uint32_t>(args.num_tokens), ticket.tag);
      continue;
    }
    std::uint32_t words[3];
    for (int w = 0; w < 3; ++w) {
      const int word = (part - 1) * 3 + w;
      words[w] = word < kRecordWords ? record[word] : 0;
    }
    send_packet(to, words[0], words[1], words[2], ticket.tag);
  }
}

/// By one thread: what `source` announced; good: no fault.
__device__ inline bool take_announced(const StepArgs& args, const Ticket& ticket, int source,
                                      const Announced& announced) {
  const Packet* from =
      place_at(args, ticket.packet_shift, args.places.call(source), args.comm.rank);
  Packet packet;
  const Arrival arrival = await(args, source, Wait::kCall, ticket.number,
                                [&] { return take_packet(from, ticket.tag, packet); });
  const bool here = arrival == Arrival::kHere;
  // Of another shape the number may be anything; the comparison will tell.
  const auto most = static_cast<std::uint32_t>(args.shape.max_tokens);
  announced.messages[source] =
      here ? static_cast<std::int32_t>(packet.words[0] < most ? packet.words[0] : most) : 0;
  announced.packeted[source] = here ? packet.words[1] : 0;
  return arrival != Arrival::kFailed;
}

/// By one thread: whether `source` called with what this rank called with; absent ranks agree.
__device__ inline bool agrees_with(const StepArgs& args, const Ticket& ticket, int source) {
  const Packet* from =
      place_at(args, ticket.packet_shift, args.places.call(source), args.comm.rank);
  protocol::CallRecord theirs = {};
  auto* words = reinterpret_cast<std::uint32_t*>(&theirs);
#pragma unroll
  for (int part = 1; part < plan::kCallPackets; ++part) {
    Packet packet;
    const Arrival arrival = await_packet(args, source, from + part, ticket.tag, packet);
    if (arrival != Arrival::kHere) return arrival == Arrival::kAbsent;
#pragma unroll
    for (int w = 0; w < 3 && (part - 1) * 3 + w < kRecordWords; ++w)
      words[(part - 1) * 3 + w] = packet.words[w];
  }
  return agrees(args.comm, args.comm.record, theirs, source);
}

/// By all threads of a block, each its share: calls of all ranks are alike. Joined by the caller.
__device__ inline bool all_agree(const StepArgs& args, const Ticket& ticket) {
  bool good = true;
  for (int source = threadIdx.x; source < args.comm.num_ranks; source += blockDim.x)
    good = agrees_with(args, ticket, source) && good;
  return good;
}

/// Whether rows go in packets: if there is room, and not so many that the packets' fourth word
/// would cost more than the fence that plain rows need.
__device__ inline bool uses_packets(const StepArgs& args, const plan::MessageArea& area,
                                    std::int64_t messages) {
  constexpr std::int64_t kMaxBytes = 1 << 20;
  return messages <= area.max_packeted && messages * args.shape.row_bytes <= kMaxBytes;
}

}  // namespace deep_ep::cuda::internode_ll
