#pragma once

#include "backend/cuda/internode_ll/places.cuh"

// What every rank says to every other ahead of its messages.
namespace deep_ep::cuda::internode_ll {

constexpr int kRecordWords = offsetof(protocol::CallRecord, num_tokens) / 4;
static_assert((kRecordWords + 2) / 3 + 1 == plan::kCallPackets, "what ranks compare, in packets");

/// By one warp: how many messages `rank` gets, whether rows are in packets, and what this rank
/// called with.
__device__ inline void announce(const auto& args, const Ticket& ticket, int rank,
                                std::int32_t messages, bool packeted) {
  const Comm& comm = args.comm;
  const int part = lane_id();
  if (part >= plan::kCallPackets) return;
  Packet* to = call_to(args, ticket, rank, part);
  const auto protocol = packeted && !is_far(args, rank) ? plan::LowLatencyProtocol::kPackets
                                                        : plan::LowLatencyProtocol::kFlagged;
  std::uint32_t words[3] = {static_cast<std::uint32_t>(messages),
                            static_cast<std::uint32_t>(protocol),
                            static_cast<std::uint32_t>(args.num_tokens)};
  const auto* record = reinterpret_cast<const std::uint32_t*>(&comm.record);
#pragma unroll
  for (int w = 0; w < 3; ++w) {
    const int word = (part - 1) * 3 + w;
    if (part > 0) words[w] = word < kRecordWords ? record[word] : 0;
  }
  send_packet(to, words[0], words[1], words[2], ticket.tag);
}

/// [R], by source.
struct Announced {
  std::int32_t* messages;   // for this rank
  std::uint32_t* packeted;  // 1: its rows travel in packets

  __device__ Announced(const SharedOffsets& at, int num_ranks)
      : messages(shared_at<std::int32_t>(at.announced)),
        packeted(shared_at<std::uint32_t>(at.announced) + num_ranks) {}
};

/// By one thread: what `source` announced; false: a fault.
__device__ inline bool take_announced(const auto& args, const Ticket& ticket, int source,
                                      const Announced& announced) {
  const auto from = call_from(args, ticket, source);
  Packet packet;
  const Arrival arrival = await(args, source, Wait::kCall, ticket.number,
                                [&] { return take_packet(from, ticket.tag, packet); });
  const bool here = arrival == Arrival::kHere;
  // Of another shape the number may be anything; the comparison will tell.
  const auto most = static_cast<std::uint32_t>(args.shape.max_tokens);
  announced.messages[source] =
      here ? static_cast<std::int32_t>(packet.words[0] < most ? packet.words[0] : most) : 0;
  announced.packeted[source] =
      here && packet.words[1] == static_cast<std::uint32_t>(plan::LowLatencyProtocol::kPackets);
  return arrival != Arrival::kFailed;
}

/// By one thread: whether `source` called with what this rank called with, and a fault if not;
/// absent ranks agree.
__device__ __noinline__ inline bool agrees_with(const StepArgs& args, const Ticket& ticket,
                                                int source) {
  const Packet* from = call_from(args, ticket, source);
  protocol::CallRecord theirs = {};
  auto* words = reinterpret_cast<std::uint32_t*>(&theirs);
#pragma unroll 1
  for (int part = 1; part < plan::kCallPackets; ++part) {
    Packet packet;
    const Arrival arrival = await_packet(args, source, from + part, ticket.tag, packet);
    if (arrival != Arrival::kHere) return arrival == Arrival::kAbsent;
    for (int w = 0; w < 3 && (part - 1) * 3 + w < kRecordWords; ++w)
      words[(part - 1) * 3 + w] = packet.words[w];
  }
  return agrees(args.comm, args.comm.record, theirs, source);
}

/// By the warps of one block, the last ones first, a packet a lane: calls of all ranks are alike.
/// Joined by the caller.
__device__ inline bool all_agree(const auto& args, const Ticket& ticket) {
  const auto* own = reinterpret_cast<const std::uint32_t*>(&args.comm.record);
  const int part = lane_id() + 1;
  bool good = true;
#pragma unroll 1
  for (int source = kWarps - 1 - warp_id(); source < args.comm.num_ranks; source += kWarps) {
    bool differs = false;
    if (part < plan::kCallPackets) {
      const auto from = call_from(args, ticket, source) + part;
      Packet packet;
      const Arrival arrival = await_packet(args, source, from, ticket.tag, packet);
#pragma unroll
      for (int w = 0; w < 3; ++w) {
        const int word = (part - 1) * 3 + w;
        differs = differs || (word < kRecordWords && packet.words[w] != own[word]);
      }
      good = good && arrival != Arrival::kFailed;
      differs = differs && arrival == Arrival::kHere;
    }
    if (__any_sync(0xffffffff, differs) && lane_id() == 0)
      good = agrees_with(args, ticket, source) && good;
  }
  return good;
}

/// Whether rows go in packets: if there is room. Their fourth word costs less than the fence that
/// plain rows need.
DEEP_EP_HD inline bool uses_packets(const plan::MessageArea& area, std::int64_t messages) {
  return messages <= area.max_packeted;
}
/// The same of this rank's tokens.
__device__ inline bool sends_packets(const auto& args, const plan::MessageArea& area) {
  return std::remove_cvref_t<decltype(args)>::kIsOfFewTokens || uses_packets(area, args.num_tokens);
}

}  // namespace deep_ep::cuda::internode_ll
