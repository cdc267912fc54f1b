#pragma once

#include "backend/cuda/internode_ll/announce.cuh"

// The messages of a dispatch, from the buffers to their places in the results.
namespace deep_ep::cuda::internode_ll {

using plan::HeadEntry;
using plan::MessageArea;

/// Where a row goes: its place in recv_x, and its scales'.
struct RowPlace {
  std::byte* x;
  std::uint32_t* scales;
};

/// By one thread: three counts of `source`, from packet `number` of them.
__device__ inline bool take_counts(const DispatchArgs& args, const Ticket& ticket, int source,
                                   int number) {
  auto* counts = shared_at<std::int32_t>(args.shared.counts) + source * args.local_experts;
  const Packet* from = place_here(ticket.packet_shift, args.places.count(source) + number);
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

/// By all threads of one block: what the result says of the counts; nothing, if there is a fault.
__device__ __noinline__ inline void write_counts(const DispatchArgs& args) {
  const auto* counts = shared_at<std::int32_t>(args.shared.counts);
  const Announced announced(args.shared, args.comm.num_ranks);
  const int ranks = args.comm.num_ranks;
  const int groups = args.rank_major ? ranks : args.local_experts;
  for (int expert = threadIdx.x; expert < args.local_experts; expert += kThreads) {
    std::int32_t begin = 0;
    for (int source = 0; source < ranks; ++source) {
      const std::int32_t rows = counts[source * args.local_experts + expert];
      if (!args.rank_major) {
        args.layout_range[std::int64_t{expert} * ranks + source] =
            std::int64_t{begin} << 32 | static_cast<std::uint32_t>(rows);
      }
      begin += rows;
    }
    if (!args.rank_major) args.recv_count[expert] = begin;
    if (args.cumulative_stats != nullptr) args.cumulative_stats[expert] += begin;
  }
  for (int source = threadIdx.x; args.rank_major && source < ranks; source += kThreads) {
    const std::int32_t rows = announced.messages[source];
    args.recv_count[source] = rows;
    args.layout_range[source] =
        source * args.shape.max_tokens << 32 | static_cast<std::uint32_t>(rows);
  }
  __syncthreads();
  // A block that finds a fault writes zeros behind its report, here they are written behind a look
  // at it: whoever comes last, zeros stay.
  if (threadIdx.x == 0) fence_sc_gpu();
  if (__syncthreads_or(protocol::load_relaxed(&args.fault->state) !=
                       protocol::FaultRecord::kNone) == 0)
    return;
  for (int i = threadIdx.x; i < groups; i += kThreads) args.recv_count[i] = 0;
}

/// By all threads, true in each: how many rows each source has for each expert here, as the place
/// of its first one among the expert's rows.
__device__ inline bool await_counts(const DispatchArgs& args, const Ticket& ticket, bool good) {
  const int ranks = args.comm.num_ranks;
  const Announced announced(args.shared, ranks);
  // 32 packets a warp.
  const int shares = args.places.count_packets / 32 + 1;
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
  if (keeps_books()) write_counts(args);
  auto* counts = shared_at<std::int32_t>(args.shared.counts);
  for (int expert = threadIdx.x; expert < args.local_experts; expert += kThreads) {
    std::int32_t begin = 0;
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

/// recv_topk_idx and recv_topk_weights at i.
__device__ inline void write_entry(const DispatchArgs& args, std::int64_t i,
                                   const HeadEntry& entry) {
  if (args.topk_idx.wide) {
    static_cast<std::int64_t*>(args.recv_topk_idx)[i] = entry.local_expert;
  } else {
    static_cast<std::int32_t*>(args.recv_topk_idx)[i] = entry.local_expert;
  }
  if (args.recv_topk_weights != nullptr) args.recv_topk_weights[i] = entry.weight;
}

__device__ inline void set_place(const DispatchArgs& args, int i, std::int64_t row,
                                 std::int32_t token) {
  args.src_info[row] = token;
  RowPlace& place = shared_at<RowPlace>(args.shared.places)[i];
  place.x = args.recv_x + row * args.x_bytes;
  if (args.num_scales == 0) return;
  const auto rows = static_cast<std::uint32_t>(
      args.rank_major ? args.shape.max_tokens : args.comm.num_ranks * args.shape.max_tokens);
  const auto number = static_cast<std::uint32_t>(row);
  const std::int64_t* strides = args.recv_scales_strides;
  place.scales = args.recv_scales + number / rows * strides[0] + number % rows * strides[1];
}

/// By one warp: the head of a message, its entries into shared memory. Entries of a rank that is
/// absent are of no expert. False: a fault.
__device__ inline bool take_head(const DispatchArgs& args, const Ticket& ticket, int source,
                                 std::int64_t message, std::int32_t& token) {
  auto* entries = shared_at<HeadEntry>(args.shared.entries);
  const Packet* from = place_here(ticket.packet_shift, args.places.messages.head(source, message));
  bool good = true;
  for (int base = 0; base <= args.shape.num_topk; base += 32) {
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

/// By one warp: where the row goes whose head is in shared memory, and what is known of it.
__device__ inline void place_row(const DispatchArgs& args, int source, std::int64_t message,
                                 std::int32_t token) {
  const int topk = args.shape.num_topk;
  const auto* entries = shared_at<HeadEntry>(args.shared.entries);
  const auto* begins = shared_at<std::int32_t>(args.shared.counts) + source * args.local_experts;
  const std::int64_t max_rows = args.comm.num_ranks * args.shape.max_tokens;
  const std::int64_t own = source * args.shape.max_tokens + message;
  int found = 0;
  for (int base = 0; base < topk; base += 32) {
    const int k = base + lane_id();
    const HeadEntry entry = k < topk ? entries[k] : HeadEntry{-1, 0, 0.0f};
    std::int64_t row = -1;
    if (args.rank_major) {
      if (k == 0) row = own;
      if (k < topk) write_entry(args, own * topk + k, entry);
    } else if (entry.local_expert >= 0 && entry.local_expert < args.local_experts) {
      bool first = true;
      for (int before = 0; before < k; ++before)
        first = first && entries[before].local_expert != entry.local_expert;
      const std::int64_t index = std::int64_t{begins[entry.local_expert]} + entry.index;
      // Beyond are only rows of another shape.
      if (first && index >= 0 && index < max_rows) row = entry.local_expert * max_rows + index;
    }
    const unsigned placed = __ballot_sync(0xffffffff, row >= 0);
    const unsigned lower = (1u << lane_id()) - 1;
    if (row >= 0) set_place(args, found + __popc(placed & lower), row, token);
    found += __popc(placed);
  }
  if (lane_id() == 0) *shared_at<std::int32_t>(args.shared.num_places) = found;
}

/// Three units of a row to all its places; of its scales into shared memory.
__device__ inline void store_group(const DispatchArgs& args, int number, const Group& group) {
  const auto* places = shared_at<RowPlace>(args.shared.places);
  const int count = *shared_at<std::int32_t>(args.shared.num_places);
  const auto x_units = static_cast<int>(args.x_bytes / 16);
  const int unit = number * Group::kUnits;
#pragma unroll 2
  for (int i = 0; i < count; ++i) {
    auto* to = reinterpret_cast<uint4*>(places[i].x) + unit;
#pragma unroll
    for (int u = 0; u < Group::kUnits; ++u) {
      if (unit + u < x_units) to[u] = group.units[u];
    }
  }
  const auto scale_units = (args.num_scales + 3) / 4;
#pragma unroll
  for (int u = 0; u < Group::kUnits; ++u) {
    const int scale_unit = unit + u - x_units;
    if (scale_unit >= 0 && scale_unit < scale_units)
      shared_at<uint4>(args.shared.scales)[scale_unit] = group.units[u];
  }
}

/// By all threads: the scales of a row from shared memory to all its places.
__device__ inline void store_scales(const DispatchArgs& args) {
  const auto* places = shared_at<RowPlace>(args.shared.places);
  const auto* scales = shared_at<std::uint32_t>(args.shared.scales);
  const int count = *shared_at<std::int32_t>(args.shared.num_places);
  for (int i = warp_id(); i < count; i += kWarps) {
    for (int s = lane_id(); s < args.num_scales; s += 32)
      places[i].scales[s * args.recv_scales_strides[2]] = scales[s];
  }
}

/// By all threads, true in each: one message to its places.
__device__ inline bool take_message(const DispatchArgs& args, const Ticket& ticket, int source,
                                    std::int64_t message, bool packeted) {
  const MessageArea& area = args.places.messages;
  const Packet* packets = place_here(ticket.packet_shift, area.row(source, message));
  const auto* plain = reinterpret_cast<const uint4*>(
      place_here(ticket.plain_shift, area.plain_row(source, message)));
  const auto groups = static_cast<int>(area.row_groups);
  const auto units = static_cast<int>(area.plain_bytes / 16);
  bool good = true;
  std::int32_t token = 0;
  if (warp_id() == 0) good = take_head(args, ticket, source, message, token);
    // The first groups are on their way while the head is looked at, most of them by other warps.
#pragma unroll 1
  for (int i = (threadIdx.x + kThreads - 32) % kThreads; i < groups || i < kThreads;
       i += kThreads) {
    Group group = {};
    if (packeted && i < groups) {
      good = await(args, source, Wait::kRows, ticket.number,
                   [&] {
                     return take_group(packets + i * MessageArea::kGroupPackets, ticket.tag, group);
                   }) != Arrival::kFailed &&
             good;
    }
    if (i < kThreads) {
      if (warp_id() == 0) {
        // acquire: pairs with the fence in send_row() of the source.
        if (!packeted) fence_acq_rel_sys();
        place_row(args, source, message, token);
      }
      if (__syncthreads_and(good) == 0) return false;
    }
#pragma unroll
    for (int u = 0; u < Group::kUnits; ++u) {
      const int unit = i * Group::kUnits + u;
      if (!packeted && unit < units) group.units[u] = plain[unit];
    }
    if (i < groups) store_group(args, i, group);
  }
  good = __syncthreads_and(good) != 0;
  if (good && args.num_scales > 0) {
    store_scales(args);
    __syncthreads();
  }
  return good;
}

/// What a rank-major result says of rows that did not come.
__device__ __noinline__ inline void fill_unused(const DispatchArgs& args) {
  const Announced announced(args.shared, args.comm.num_ranks);
  const auto entries = static_cast<std::uint32_t>(args.shape.max_tokens * args.shape.num_topk);
  for (int source = 0; source < args.comm.num_ranks; ++source) {
    const std::uint32_t used = announced.messages[source] * args.shape.num_topk;
    for (std::uint32_t i = used + blockIdx.x * kThreads + threadIdx.x; i < entries;
         i += gridDim.x * kThreads)
      write_entry(args, std::int64_t{source} * entries + i, {-1, 0, 0.0f});
  }
}

__device__ inline bool receive(const DispatchArgs& args, const Ticket& ticket, bool good) {
  __syncthreads();
  if (!await_counts(args, ticket, good)) return false;
  if (args.rank_major) fill_unused(args);
  const Announced announced(args.shared, args.comm.num_ranks);
  // Blocks without a token of their own go first.
  const unsigned blocks = gridDim.x;
  const auto tokens = static_cast<unsigned>(args.sends ? args.num_tokens : 0);
  unsigned turn = (blockIdx.x + blocks - (tokens + 1) % blocks) % blocks;
  for (int source = 0; source < args.comm.num_ranks; ++source) {
    const auto messages = static_cast<unsigned>(announced.messages[source]);
    const bool packeted = announced.packeted[source] != 0;
    for (; turn < messages; turn += blocks) {
      if (!take_message(args, ticket, source, turn, packeted)) return false;
    }
    turn -= messages;
  }
  return true;
}

}  // namespace deep_ep::cuda::internode_ll
