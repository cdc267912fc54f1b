#pragma once

#include "backend/cuda/internode_ll/slices.cuh"

// A row is in shared memory on both ends of its way, so that threads next to each other move what
// lies next to each other: three words a packet, or sixteen bytes plainly.
namespace deep_ep::cuda::internode_ll {

/// A slice of a row, by the warps from `first_warp` on, each its share. `order`: which words of the
/// row a packet has.
__device__ inline void send_packets(const std::byte* row, Packet* to, const Slice& slice,
                                    const auto& order, int first_warp, std::uint32_t tag) {
  constexpr int kBatch = 3;
  const auto* words = reinterpret_cast<const std::uint32_t*>(row);
  const int stride = kThreads - first_warp * 32;
  const int end = slice.end_packet();
#pragma unroll 1
  for (int first = slice.first_packet() + static_cast<int>(threadIdx.x) - first_warp * 32;
       first < end; first += kBatch * stride) {
    std::uint32_t batch[kBatch][3] = {};
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * stride;
#pragma unroll
      for (int w = 0; w < 3; ++w)
        if (i < end) batch[j][w] = words[order.at(i, w)];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (first + j * stride < end)
        send_packet(to + first + j * stride, batch[j][0], batch[j][1], batch[j][2], tag);
  }
}

/// By all threads: units [begin, end) of 16 bytes.
__device__ inline void copy_units(const std::byte* row, std::byte* to, int begin, int end) {
#pragma unroll 1
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(row)[i];
}

/// What a thread looks for at once, so that its loads are under way together.
template <int kSize>
struct PacketBatch {
  Packet packets[kSize];

  /// Packets i, i + stride, ... below `count`.
  __device__ Arrival await(const auto& args, const Ticket& ticket, int source, const Packet* from,
                           int i, int stride, int count) {
    return internode_ll::await(args, source, Wait::kRows, ticket.number, [&] {
      bool here = true;
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        if (i + j * stride < count)
          here = take_packet(from + i + j * stride, ticket.tag, packets[j]) && here;
      return here;
    });
  }
};

/// By the warps from `first_warp` on, each its share: a slice of a row into shared memory, from the
/// packets of the row.
__device__ inline Arrival take_packets(const auto& args, const Ticket& ticket, int source,
                                       const Packet* from, const Slice& slice, const auto& order,
                                       int first_warp, std::byte* row) {
  constexpr int kBatch = 3;
  auto* words = reinterpret_cast<std::uint32_t*>(row);
  const int stride = kThreads - first_warp * 32;
  const int end = slice.end_packet();
  Arrival arrival = Arrival::kHere;
#pragma unroll 1
  for (int i = slice.first_packet() + static_cast<int>(threadIdx.x) - first_warp * 32;
       i < end && arrival == Arrival::kHere; i += kBatch * stride) {
    PacketBatch<kBatch> batch;
    arrival = batch.await(args, ticket, source, from, i, stride, end);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int number = i + j * stride;
      if (number >= end) break;
#pragma unroll
      for (int w = 0; w < 3; ++w) words[order.at(number, w)] = batch.packets[j].words[w];
    }
  }
  return arrival;
}

}  // namespace deep_ep::cuda::internode_ll
