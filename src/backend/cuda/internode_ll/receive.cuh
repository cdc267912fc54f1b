#pragma once

#include <type_traits>

#include "backend/cuda/internode_ll/announce.cuh"
#include "backend/cuda/internode_ll/lane_route.cuh"
#include "backend/cuda/internode_ll/row_places.cuh"

// The messages of a dispatch, from the buffers to their places in the results.
namespace deep_ep::cuda::internode_ll {

/// What the head of a token's message for `rank` says of entry k.
__device__ inline HeadEntry entry_of(const auto& args, std::int64_t token, int k, int rank,
                                     const Route& route) {
  const std::int32_t begin = route.begin[k];
  // A repetition tells rank-major's topk, and has no row of its own.
  const bool there =
      args.is_rank_major() ? begin == rank * args.local_experts : route.rank[k] == rank;
  HeadEntry entry{there ? route.expert[k] - begin : -1, route.index[k], 0.0f};
  if (there && args.topk_weights != nullptr)
    entry.weight = args.topk_weights[token * args.shape.num_topk + k];
  return entry;
}

/// By one thread: three counts of `source`, from packet `number` of them.
__device__ inline bool take_counts(const auto& args, const Ticket& ticket, int source, int number) {
  auto* counts = shared_at<std::int32_t>(args.shared.counts) + source * args.local_experts;
  const auto from = counts_from(args, ticket, source, number);
  Packet packet = {};
  const Arrival arrival = await_packet(args, source, from, ticket.tag, packet);
#pragma unroll
  for (int w = 0; w < 3; ++w) {
    const int expert = number * 3 + w;
    if (expert >= args.local_experts) continue;
    counts[expert] = arrival == Arrival::kHere ? static_cast<std::int32_t>(packet.words[w]) : 0;
  }
  return arrival != Arrival::kFailed;
}

/// By all threads of one block: what the result says of the counts. See void_counts().
__device__ inline void write_counts(const auto& args) {
  const auto* counts = shared_at<std::int32_t>(args.shared.counts);
  const Announced announced(args.shared, args.comm.num_ranks);
  const int ranks = args.comm.num_ranks;
#pragma unroll 1
  for (int expert = threadIdx.x; expert < args.local_experts; expert += kThreads) {
    std::int32_t begin = 0;
#pragma unroll 1
    for (int source = 0; source < ranks; ++source) {
      const std::int32_t rows = counts[source * args.local_experts + expert];
      if (!args.is_rank_major()) {
        args.layout_range[std::int64_t{expert} * ranks + source] =
            std::int64_t{begin} << 32 | static_cast<std::uint32_t>(rows);
      }
      begin += rows;
    }
    if (!args.is_rank_major()) args.recv_count[expert] = begin;
    if (args.cumulative_stats != nullptr) args.cumulative_stats[expert] += begin;
  }
#pragma unroll 1
  for (int source = threadIdx.x; args.is_rank_major() && source < ranks; source += kThreads) {
    const std::int32_t rows = announced.messages[source];
    args.recv_count[source] = rows;
    args.layout_range[source] =
        source * args.shape.max_tokens << 32 | static_cast<std::uint32_t>(rows);
  }
}

/// By all threads of a block that has failed: a call that failed anywhere on this rank has no rows.
/// A block that failed writes zeros behind its report; the one that wrote counts looks for a report
/// behind them, and then a thread writes zeros where it wrote counts: whoever comes last, zeros
/// stay.
__device__ __noinline__ void void_counts(const auto& args) {
  fence_sc_gpu();
  const int groups = args.is_rank_major() ? args.comm.num_ranks : args.local_experts;
#pragma unroll 1
  for (int i = threadIdx.x; i < groups; i += kThreads) args.recv_count[i] = 0;
}

/// Which message a block takes first, of all that have come: those without a token of their own go
/// first.
__device__ inline unsigned first_turn(const StepArgs& args) {
  return first_behind(static_cast<unsigned>(args.sends ? args.num_tokens << args.slice_shift : 0));
}

/// By all threads, true in each: how many messages each source has.
__device__ inline bool await_messages(const auto& args, const Ticket& ticket, bool good) {
  const Announced announced(args.shared, args.comm.num_ranks);
#pragma unroll 1
  for (int source = threadIdx.x; source < args.comm.num_ranks; source += kThreads)
    good = take_announced(args, ticket, source, announced) && good;
  return __syncthreads_and(good) != 0;
}

/// How many blocks share a message of `source`, as a power of two.
__device__ inline int taken_shift(const auto& args, const Announced& announced, int source) {
  return announced.packeted[source] != 0 ? args.slice_shift : 0;
}

/// Whether this block has a message, by what has been announced.
__device__ inline bool has_message(const auto& args, const Ticket& ticket) {
  const Announced announced(args.shared, args.comm.num_ranks);
  unsigned messages = 0;
#pragma unroll 1
  for (int source = 0; source < args.comm.num_ranks; ++source)
    if (!ticket.keeps_own || source != args.comm.rank)
      messages += static_cast<unsigned>(announced.messages[source])
                  << taken_shift(args, announced, source);
  return first_turn(args) < messages;
}

/// By all threads, true in each: how many rows each source has for each expert here, as the place
/// of its first one among the expert's rows.
__device__ inline bool await_counts(const auto& args, const Ticket& ticket, bool good) {
  const int ranks = args.comm.num_ranks;
  const Announced announced(args.shared, ranks);
  // 32 packets a warp.
  const int shares = args.places.count_packets / 32 + 1;
#pragma unroll 1
  for (int share = warp_id(); share < ranks * shares; share += kWarps) {
    const int source = share / shares;
    const int i = share % shares * 32 + lane_id();
    if (i > args.places.count_packets) continue;
    good = (i == 0 ? take_announced(args, ticket, source, announced)
                   : take_counts(args, ticket, source, i - 1)) &&
           good;
  }
  if (keeps_books()) good = all_agree(args, ticket) && good;
  if (__syncthreads_and(good) == 0) return false;
  if (keeps_books()) {
    write_counts(args);
    fence_sc_gpu();
    if (protocol::load_relaxed(&args.fault->state) != protocol::FaultRecord::kNone)
      void_counts(args);
  }
  auto* counts = shared_at<std::int32_t>(args.shared.counts);
#pragma unroll 1
  for (int expert = threadIdx.x; expert < args.local_experts; expert += kThreads) {
    std::int32_t begin = 0;
#pragma unroll 1
    for (int source = 0; source < ranks; ++source) {
      std::int32_t& count = counts[source * args.local_experts + expert];
      const std::int32_t rows = count;
      count = begin;
      begin += rows;
    }
  }
  __syncthreads();
  return true;
}

/// By one warp: the head of a message of fewer than 32 entries, and where its row goes. Entries of
/// a rank that is absent are of no expert. False in any lane: a fault.
__device__ inline bool take_few_entries(const auto& args, const Ticket& ticket, int source,
                                        std::int64_t message) {
  const int part = lane_id();
  const auto from = head_from(args, ticket, Area::kMessages, source, message);
  Packet packet = {};
  Arrival arrival = Arrival::kHere;
  if (part <= args.shape.num_topk)
    arrival = await_packet(args, source, from + part, ticket.tag, packet);
  const auto token = static_cast<std::int32_t>(__shfl_sync(0xffffffff, packet.words[0], 0));
  const HeadEntry entry{arrival == Arrival::kHere ? static_cast<std::int32_t>(packet.words[0]) : -1,
                        static_cast<std::int32_t>(packet.words[1]),
                        __uint_as_float(packet.words[2])};
  return place_entries(args, ticket, source, message, token, part - 1, entry) &&
         arrival != Arrival::kFailed;
}

/// By one warp: the head of a message, its entries into shared memory. Entries of a rank that is
/// absent are of no expert. False: a fault.
__device__ inline bool take_head(const auto& args, const Ticket& ticket, int source,
                                 std::int64_t message, std::int32_t& token) {
  auto* entries = shared_at<HeadEntry>(args.shared.entries);
  const auto from = head_from(args, ticket, Area::kMessages, source, message);
  bool good = true;
#pragma unroll 1
  for (int base = 0; takes_from(args, base, args.shape.num_topk + 1); base += 32) {
    const int part = base + lane_id();
    Packet packet = {};
    Arrival arrival = Arrival::kHere;
    if (part <= args.shape.num_topk)
      arrival = await_packet(args, source, from + part, ticket.tag, packet);
    good = good && !__any_sync(0xffffffff, arrival == Arrival::kFailed);
    if (base == 0) token = __shfl_sync(0xffffffff, static_cast<int>(packet.words[0]), 0);
    if (part == 0 || part > args.shape.num_topk) continue;
    const bool here = arrival == Arrival::kHere;
    entries[part - 1] = {here ? static_cast<std::int32_t>(packet.words[0]) : -1,
                         static_cast<std::int32_t>(packet.words[1]),
                         __uint_as_float(packet.words[2])};
  }
  __syncwarp();
  return good;
}

/// By one warp: what its source wrote before the head is visible.
__device__ inline void acquire_head(const auto& args, const auto& head) {
#pragma unroll 1
  for (int part = lane_id(); part <= args.shape.num_topk; part += 32) acquire(head + part);
}

/// By all threads, true in each: a slice of one message to its places. The first warp looks at its
/// head, the others meanwhile at its packets. What is known of the row all that share it write.
__device__ inline bool take_message(const auto& args, const Ticket& ticket, int source,
                                    std::int64_t message, const Slice& slice, bool packeted) {
  const MessageArea& area = args.places.messages;
  auto* row = shared_at<std::byte>(args.shared.row);
  bool good = true;
  if (warp_id() == 0) {
    if constexpr (std::remove_cvref_t<decltype(args)>::kFew) {
      good = take_few_entries(args, ticket, source, message);
    } else {
      std::int32_t token = 0;
      good = take_head(args, ticket, source, message, token);
      place_row(args, source, message, token);
    }
    // acquire: pairs with the fence in send_row() of the source; the barrier hands it on.
    if (!packeted) acquire_head(args, head_from(args, ticket, Area::kMessages, source, message));
  } else if (packeted) {
    const Packet* packets = place_here(ticket.packet_shift, area.row(source, message));
    good = take_packets(args, ticket, source, packets, slice, RowWords(args), 1, row) !=
           Arrival::kFailed;
  }
  if (__syncthreads_and(good) == 0) return false;
  store_row(args, slice,
            packeted ? row : plain_row_from(args, ticket, Area::kMessages, source, message));
  __syncthreads();  // the row and its places have been read
  return true;
}

/// By all threads, true in each: this block's token, whose row is in shared memory, to its places
/// here.
__device__ inline bool place_own(const auto& args, const Ticket& ticket, const Route& route) {
  const std::int64_t token = first_token();
  if (token >= args.num_tokens) return true;
  const int own = args.comm.rank;
  int to = 0;
  while (to < *route.num_ranks && route.to_rank[to] != own) ++to;
  if (to == *route.num_ranks) return true;
  bool good = true;
  if (warp_id() != 0) {
  } else if constexpr (std::remove_cvref_t<decltype(args)>::kFew) {
    HeadEntry entry{-1, 0, 0.0f};
    if (lane_id() < args.shape.num_topk) entry = entry_of(args, token, lane_id(), own, route);
    good = place_entries(args, ticket, own, route.to_message[to], static_cast<std::int32_t>(token),
                         lane_id(), entry);
  } else {
    auto* entries = shared_at<HeadEntry>(args.shared.entries);
#pragma unroll 1
    for (int k = lane_id(); k < args.shape.num_topk; k += 32)
      entries[k] = entry_of(args, token, k, own, route);
    __syncwarp();
    place_row(args, own, route.to_message[to], static_cast<std::int32_t>(token));
  }
  if (__syncthreads_and(good) == 0) return false;
  store_row(args, slice_of(args, 0, 0), shared_at<std::byte>(args.shared.row));
  __syncthreads();  // the row and its places have been read
  return true;
}

/// What a rank-major result says of rows that did not come.
__device__ inline void fill_unused(const auto& args) {
  const Announced announced(args.shared, args.comm.num_ranks);
  const auto entries = static_cast<std::uint32_t>(args.shape.max_tokens * args.shape.num_topk);
#pragma unroll 1
  for (int source = 0; source < args.comm.num_ranks; ++source) {
    const std::uint32_t used = announced.messages[source] * args.shape.num_topk;
#pragma unroll 1
    for (std::uint32_t i = used + blockIdx.x * kThreads + threadIdx.x; i < entries;
         i += gridDim.x * kThreads)
      write_entry(args, std::int64_t{source} * entries + i, {-1, 0, 0.0f});
  }
}

__device__ inline bool receive(const auto& args, const Ticket& ticket, bool good) {
  __syncthreads();
  // Of few entries each asks for the counts that it needs.
  constexpr bool kAsks = std::remove_cvref_t<decltype(args)>::kFew;
  // Who likely has no message, as ranks have about as many tokens, looks first, and leaves the
  // memory to those that wait for counts.
  const auto tokens = static_cast<unsigned>(args.num_tokens);
  const unsigned expected = tokens * (args.comm.num_ranks - (ticket.keeps_own ? 1 : 0))
                            << args.slice_shift;
  const bool likely = first_turn(args) < expected || (ticket.keeps_own && first_token() < tokens);
  const bool needs = !kAsks && !args.is_rank_major();
  const bool counts = keeps_books() || (needs && likely);
  if (!counts && !await_messages(args, ticket, good)) return false;
  if ((counts || (needs && has_message(args, ticket))) && !await_counts(args, ticket, good))
    return false;
  if (args.is_rank_major()) fill_unused(args);
  const Announced announced(args.shared, args.comm.num_ranks);
  const unsigned blocks = gridDim.x;
  unsigned turn = first_turn(args);
  if (ticket.keeps_own && !place_own(args, ticket, Route(args.shared))) return false;
#pragma unroll 1
  for (int i = 0; i < args.comm.num_ranks; ++i) {
    const int source = rank_from_own(args, i);
    if (ticket.keeps_own && source == args.comm.rank) continue;
    const auto messages = static_cast<unsigned>(announced.messages[source]);
    const bool packeted = announced.packeted[source] != 0;
    const int shift = taken_shift(args, announced, source);
#pragma unroll 1
    for (; turn < messages << shift; turn += blocks) {
      if (!take_message(args, ticket, source, turn >> shift, nth_slice(args, turn, shift),
                        packeted))
        return false;
    }
    turn -= messages << shift;
  }
  return true;
}

}  // namespace deep_ep::cuda::internode_ll
