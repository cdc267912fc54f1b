#pragma once

#include "backend/cuda/device/sums.cuh"
#include "backend/cuda/internode_ll/announce.cuh"
#include "backend/cuda/internode_ll/rows.cuh"
#include "backend/cuda/internode_ll/slices.cuh"

// The rows of a combine on the experts' rank: their weights, their sum, its way home.
namespace deep_ep::cuda::internode_ll {

/// A row of x and its weight in a sum.
struct alignas(16) Addend {
  const uint4* row;
  float weight;
};

/// What a lane knows of an entry: that `row` of the expert is the token's row, as src_info says.
struct Claim {
  std::int32_t token = 0;
  std::int32_t of = 0;
  std::int32_t expert = 0;
  std::int64_t row = 0;
};

/// False, and a fault, if it does not hold.
__device__ inline bool holds(const CombineArgs& args, int source, const Claim& claim) {
  if (claim.of == claim.token) return true;
  raise(args.comm, Finding::kOtherRouting, kInvalidArgumentCode, source, claim.token, claim.expert,
        claim.row, claim.of);
  return false;
}

/// By one warp: the entries of a message, as rows of `x_bytes` to sum, into shared memory. False: a
/// fault. The last claim of a lane is left to the caller: it is on its way while the rows are.
__device__ inline bool take_weights(const auto& args, const Ticket& ticket, int source,
                                    std::int64_t message, std::int64_t x_bytes, Claim& claim) {
  auto* addends = shared_at<Addend>(args.shared.places);
  const std::int64_t max_rows = args.comm.num_ranks * args.shape.max_tokens;
  const auto head = head_from(args, ticket, Area::kMessages, source, message);
  bool good = true;
  int found = 0;
  unsigned absent = 0;
  std::int32_t token = 0;
#pragma unroll 1
  for (int base = 0; takes_from(args, base, args.shape.num_topk + 1) && good; base += 32) {
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
      if (base > 0) good = holds(args, source, claim) && good;
      const std::int64_t begin =
          shared_at<std::int32_t>(args.shared.ranges)[expert * args.comm.num_ranks + source];
      const std::int64_t row = begin + static_cast<std::int32_t>(packet.words[1]);
      const bool inside = row >= 0 && row < max_rows;
      const std::int64_t slot = expert * max_rows + (inside ? row : 0);
      claim = {token, inside ? args.src_info[slot] : -1, expert, row};
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

/// Eight values of what goes home: the addends' sum, or the one row that is summed already.
__device__ inline uint4 partial(const auto& args, int unit) {
  const auto* addends = shared_at<Addend>(args.shared.places);
  if (args.is_rank_major()) return addends[0].row[unit];
  const int count = *shared_at<std::int32_t>(args.shared.num_places);
  Sum8 sum;
#pragma unroll 4
  for (int i = 0; i < count; ++i) sum.add(addends[i].row[unit], addends[i].weight);
  return sum.round();
}

/// By all threads: the row in shared memory to its source, which it is put to.
__device__ inline void put_home(const auto& args, const Ticket& ticket, int source,
                                std::int64_t message) {
  copy_units(shared_at<std::byte>(args.shared.row),
             plain_row_to(args, ticket, Area::kReturns, source, message), 0,
             static_cast<int>(args.places.returns.plain_bytes / 16));
  if (threadIdx.x == 0)
    send_packet(head_to(args, ticket, Area::kReturns, source, message), 0, 0, 0, ticket.tag);
  // What each thread wrote is visible to who puts it.
  fence_acq_rel_sys();
  __syncthreads();
  if (warp_id() == 0) put_message(args, ticket, Area::kReturns, source, message);
}

/// By all threads: the row in shared memory to its source, in packets those of `slice`.
__device__ inline void send_home(const auto& args, const Ticket& ticket, int source,
                                 std::int64_t message, const Slice& slice, bool packeted) {
  if (is_far(args, source)) return put_home(args, ticket, source, message);
  const MessageArea& area = args.places.returns;
  const int rank = args.comm.rank;
  const auto* row = shared_at<std::byte>(args.shared.row);
  if (packeted) {
    send_packets(row, place_at(args, ticket.packet_shift, area.row(rank, message), source), slice,
                 PlainWords{}, 0, ticket.tag);
    return;
  }
  copy_units(row, plain_row_to(args, ticket, Area::kReturns, source, message), 0,
             static_cast<int>(area.plain_bytes / 16));
  __syncthreads();
  if (threadIdx.x != 0) return;
  // release: with the head, which is relaxed; pairs with the acquire in await_rows() of the source.
  fence_acq_rel_sys();
  send_packet(head_to(args, ticket, Area::kReturns, source, message), 0, 0, 0, ticket.tag);
}

}  // namespace deep_ep::cuda::internode_ll
