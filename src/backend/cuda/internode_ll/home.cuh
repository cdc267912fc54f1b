#pragma once

#include "backend/cuda/device/sums.cuh"
#include "backend/cuda/internode_ll/announce.cuh"

// The rows of a combine on the experts' rank: their weights, their sum, its way home.
namespace deep_ep::cuda::internode_ll {

using plan::MessageArea;

/// A row of x and its weight in a sum.
struct alignas(16) Addend {
  const uint4* row;
  float weight;
};

__device__ __noinline__ inline void raise_other_routing(const CombineArgs& args, int source,
                                                        std::int32_t token, std::int32_t expert,
                                                        std::int64_t row, std::int32_t of) {
  Report report;
  report.finding = Finding::kOtherRouting;
  report.code = kInvalidArgumentCode;
  report.rank = source;
  report.values[0] = token;
  report.values[1] = expert;
  report.values[2] = row;
  report.values[3] = of;
  raise(args.comm, report);
}

/// By one warp: the entries of a message, as rows of `x_bytes` to sum, into shared memory. False: a
/// fault.
__device__ inline bool take_weights(const CombineArgs& args, const Ticket& ticket, int source,
                                    std::int64_t message, std::int64_t x_bytes) {
  auto* addends = shared_at<Addend>(args.shared.places);
  const std::int64_t max_rows = args.comm.num_ranks * args.shape.max_tokens;
  const Packet* head = place_here(ticket.packet_shift, args.places.messages.head(source, message));
  bool good = true;
  int found = 0;
  unsigned absent = 0;
  std::int32_t token = 0;
  for (int base = 0; base <= args.shape.num_topk && good; base += 32) {
    const int part = base + lane_id();
    Packet packet = {};
    Arrival arrival = Arrival::kHere;
    if (part <= args.shape.num_topk)
      arrival = await_packet(args, source, head + part, ticket.tag, packet);
    good = arrival != Arrival::kFailed;
    if (base == 0) token = __shfl_sync(0xffffffff, static_cast<int>(packet.words[0]), 0);
    const auto expert = static_cast<std::int32_t>(packet.words[0]);
    const bool entry = part > 0 && part <= args.shape.num_topk && arrival == Arrival::kHere &&
                       expert >= 0 && expert < args.local_experts;
    if (entry) {
      const std::int64_t range =
          args.layout_range[std::int64_t{expert} * args.comm.num_ranks + source];
      const std::int64_t row = (range >> 32) + static_cast<std::int32_t>(packet.words[1]);
      const std::int64_t slot = expert * max_rows + row;
      const std::int32_t of = row >= 0 && row < max_rows ? args.src_info[slot] : -1;
      if (of != token) {
        raise_other_routing(args, source, token, expert, row, of);
        good = false;
      }
      addends[part - 1] = {reinterpret_cast<const uint4*>(args.x + slot * x_bytes),
                           __uint_as_float(packet.words[2])};
    }
    found += __popc(__ballot_sync(0xffffffff, entry));
    absent |= __ballot_sync(0xffffffff, arrival == Arrival::kAbsent);
    good = __all_sync(0xffffffff, good) != 0;
  }
  // Of a rank that went in between nothing is summed: what is missing would be a hole.
  if (lane_id() == 0) *shared_at<std::int32_t>(args.shared.num_places) = absent != 0 ? 0 : found;
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

/// Three units of what goes home: the addends' sum, or the one row that is summed already.
__device__ inline Group partial(const CombineArgs& args, int number, int units) {
  const auto* addends = shared_at<Addend>(args.shared.places);
  const int count = *shared_at<std::int32_t>(args.shared.num_places);
  const int unit = number * Group::kUnits;
  Group group = {};
  if (args.rank_major) {
#pragma unroll
    for (int u = 0; u < Group::kUnits; ++u)
      if (unit + u < units) group.units[u] = addends[0].row[unit + u];
    return group;
  }
  Sum8 sums[Group::kUnits];
#pragma unroll 2
  for (int i = 0; i < count; ++i) {
    const Addend addend = addends[i];
#pragma unroll
    for (int u = 0; u < Group::kUnits; ++u)
      if (unit + u < units) sums[u].add(addend.row[unit + u], addend.weight);
  }
#pragma unroll
  for (int u = 0; u < Group::kUnits; ++u) group.units[u] = sums[u].round();
  return group;
}

/// By all threads: this rank's row for a message of `source`, to it, by what make(i) gives as its
/// i-th three units.
template <class Make>
__device__ __forceinline__ void send_groups(const CombineArgs& args, const Ticket& ticket,
                                            int source, std::int64_t message, bool packeted,
                                            Make&& make) {
  const MessageArea& area = args.places.returns;
  const int rank = args.comm.rank;
  const auto units = static_cast<int>(area.plain_bytes / 16);
  Packet* packets = place_at(args, ticket.packet_shift, area.row(rank, message), source);
  auto* plain = reinterpret_cast<uint4*>(
      place_at(args, ticket.plain_shift, area.plain_row(rank, message), source));
#pragma unroll 1
  for (int i = threadIdx.x; i < static_cast<int>(area.row_groups); i += kThreads) {
    const Group group = make(i, units);
    if (packeted) {
      send_group(packets + i * MessageArea::kGroupPackets, group, ticket.tag);
      continue;
    }
#pragma unroll
    for (int u = 0; u < Group::kUnits; ++u)
      if (i * Group::kUnits + u < units) plain[i * Group::kUnits + u] = group.units[u];
  }
  if (packeted) return;
  __syncthreads();
  if (threadIdx.x != 0) return;
  // release: with the head, which is relaxed; pairs with the fence in await_rows() of the source.
  fence_acq_rel_sys();
  send_packet(place_at(args, ticket.packet_shift, area.head(rank, message), source), 0, 0, 0,
              ticket.tag);
}

}  // namespace deep_ep::cuda::internode_ll
