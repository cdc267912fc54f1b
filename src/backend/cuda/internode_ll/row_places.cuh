#pragma once

#include "backend/cuda/internode_ll/announce.cuh"
#include "backend/cuda/internode_ll/rows.cuh"

// Where the row of a message of a dispatch goes in the results, and what they say of it.
namespace deep_ep::cuda::internode_ll {

using plan::HeadEntry;

/// Where a row goes: its place in recv_x, and its scales'.
struct RowPlace {
  std::byte* x;
  std::uint32_t* scales;
};

/// recv_topk_idx and recv_topk_weights at i.
__device__ inline void write_entry(const auto& args, std::int64_t i, const HeadEntry& entry) {
  if (args.topk_idx.wide) {
    static_cast<std::int64_t*>(args.recv_topk_idx)[i] = entry.local_expert;
  } else {
    static_cast<std::int32_t*>(args.recv_topk_idx)[i] = entry.local_expert;
  }
  if (args.recv_topk_weights != nullptr) args.recv_topk_weights[i] = entry.weight;
}

/// Place i of a message: row `index` of those of an expert, or of a source in rank-major.
__device__ inline void set_place(const auto& args, int i, int group, std::int64_t index,
                                 std::int32_t token) {
  const std::int64_t rows =
      args.is_rank_major() ? args.shape.max_tokens : args.comm.num_ranks * args.shape.max_tokens;
  const std::int64_t row = group * rows + index;
  args.src_info[row] = token;
  RowPlace& place = shared_at<RowPlace>(args.shared.places)[i];
  place.x = args.recv_x + row * args.x_bytes;
  if (args.num_scales == 0) return;
  const std::int64_t* strides = args.recv_scales_strides;
  place.scales = args.recv_scales + group * strides[0] + index * strides[1];
}

/// By a lane: how many rows of a local expert come before those of `source`: counts of the sources
/// before it. False: a fault.
__device__ inline bool count_rows_before(const auto& args, const Ticket& ticket, int source,
                                         int expert, std::int32_t& rows) {
  constexpr int kBatch = 4;
  const Announced announced(args.shared, args.comm.num_ranks);
  const Packet* from = place_here(ticket.packet_shift, args.places.counts + expert / 3);
  const int word = expert % 3;
#pragma unroll 1
  for (int base = 0; base < source; base += kBatch) {
    Packet packets[kBatch] = {};
    const auto take = [&](int j) {
      return take_packet(from + (base + j) * args.places.count_packets, ticket.tag, packets[j]);
    };
    bool taken[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) taken[j] = base + j >= source || take(j);
    bool here = true;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (base + j >= source) continue;
      // Who has no message has no rows, nor has who was absent when its call was asked for. Who is
      // masked only now has been counted.
      if (announced.messages[base + j] != 0) {
        here = taken[j] && here;
      } else {
        packets[j] = {};
      }
    }
    if (!here) {
      // One after the other, since each may be absent.
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (base + j >= source) break;
        if (announced.messages[base + j] == 0 || take(j)) continue;
        const Arrival arrival = await_packet(
            args, base + j, from + (base + j) * args.places.count_packets, ticket.tag, packets[j]);
        if (arrival == Arrival::kFailed) return false;
        if (arrival == Arrival::kAbsent) packets[j] = {};
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      rows += static_cast<std::int32_t>(word == 0   ? packets[j].words[0]
                                        : word == 1 ? packets[j].words[1]
                                                    : packets[j].words[2]);
  }
  return true;
}

/// By one warp, an entry of a message a lane: the places of its row, and what is known of it.
/// False: a fault.
__device__ inline bool place_entries(const auto& args, const Ticket& ticket, int source,
                                     std::int64_t message, std::int32_t token, int k,
                                     const HeadEntry& entry) {
  if (args.is_rank_major()) {
    const std::int64_t own = source * args.shape.max_tokens + message;
    if (k >= 0 && k < args.shape.num_topk) write_entry(args, own * args.shape.num_topk + k, entry);
    if (lane_id() != 0) return true;
    set_place(args, 0, source, message, token);
    *shared_at<std::int32_t>(args.shared.num_places) = 1;
    return true;
  }
  const std::int64_t max_rows = args.comm.num_ranks * args.shape.max_tokens;
  std::int32_t begin = 0;
  bool placed = k >= 0 && k < args.shape.num_topk && entry.local_expert >= 0 &&
                entry.local_expert < args.local_experts;
  const bool good = !placed || count_rows_before(args, ticket, source, entry.local_expert, begin);
  const std::int64_t place = std::int64_t{begin} + entry.index;
  // Beyond are only rows of another shape.
  placed = placed && good && place >= 0 && place < max_rows;
  const unsigned all = __ballot_sync(0xffffffff, placed);
  if (placed)
    set_place(args, __popc(all & ((1u << lane_id()) - 1)), entry.local_expert, place, token);
  if (lane_id() == 0) *shared_at<std::int32_t>(args.shared.num_places) = __popc(all);
  return good;
}

/// By one warp: where the row goes whose head is in shared memory, and what is known of it.
__device__ inline void place_row(const auto& args, int source, std::int64_t message,
                                 std::int32_t token) {
  const int topk = args.shape.num_topk;
  const auto* entries = shared_at<HeadEntry>(args.shared.entries);
  const auto* begins = shared_at<std::int32_t>(args.shared.counts) + source * args.local_experts;
  const std::int64_t max_rows = args.comm.num_ranks * args.shape.max_tokens;
  const std::int64_t own = source * args.shape.max_tokens + message;
  int found = 0;
#pragma unroll 1
  for (int base = 0; takes_from(args, base, topk); base += 32) {
    const int k = base + lane_id();
    const HeadEntry entry = k < topk ? entries[k] : HeadEntry{-1, 0, 0.0f};
    const unsigned lower = (1u << lane_id()) - 1;
    bool first = (__match_any_sync(0xffffffff, entry.local_expert) & lower) == 0;
    int group = source;
    std::int64_t index = -1;
    if (args.is_rank_major()) {
      if (k == 0) index = message;
      if (k < topk) write_entry(args, own * topk + k, entry);
    } else if (entry.local_expert >= 0 && entry.local_expert < args.local_experts) {
#pragma unroll 1
      for (int before = 0; before < base; ++before)
        first = first && entries[before].local_expert != entry.local_expert;
      group = entry.local_expert;
      const std::int64_t place = std::int64_t{begins[group]} + entry.index;
      // Beyond are only rows of another shape.
      if (first && place < max_rows) index = place;
    }
    const unsigned placed = __ballot_sync(0xffffffff, index >= 0);
    if (index >= 0) set_place(args, found + __popc(placed & lower), group, index, token);
    found += __popc(placed);
  }
  if (lane_id() == 0) *shared_at<std::int32_t>(args.shared.num_places) = found;
}

/// By all threads: a slice of a row, with its scales behind it, to all its places.
__device__ inline void store_row(const auto& args, const Slice& slice, const std::byte* row) {
  const auto* places = shared_at<RowPlace>(args.shared.places);
  const int count = *shared_at<std::int32_t>(args.shared.num_places);
  const int units = slice.end_unit(static_cast<int>(args.x_bytes / 16));
  constexpr int kBatch = 2;
#pragma unroll 1
  for (int first = slice.first_unit() + static_cast<int>(threadIdx.x); first < units;
       first += kBatch * kThreads) {
    uint4 bytes[kBatch] = {};
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (first + j * kThreads < units)
        bytes[j] = reinterpret_cast<const uint4*>(row)[first + j * kThreads];
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      auto* to = reinterpret_cast<uint4*>(places[i].x) + first;
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        if (first + j * kThreads < units) to[j * kThreads] = bytes[j];
    }
  }
  const auto* scales = reinterpret_cast<const std::uint32_t*>(row + args.x_bytes);
#pragma unroll 1
  for (int i = args.num_scales == 0 ? count : warp_id(); i < count; i += kWarps) {
#pragma unroll 2
    for (int s = first_scale(args, slice) + lane_id(); s < end_scale(args, slice); s += 32)
      places[i].scales[s * args.recv_scales_strides[2]] = scales[s];
  }
}

}  // namespace deep_ep::cuda::internode_ll
