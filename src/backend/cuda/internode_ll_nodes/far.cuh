#pragma once

#include "backend/cuda/internode/rail.cuh"
#include "backend/cuda/internode_ll/announce.cuh"
#include "backend/cuda/internode_ll/count.cuh"
#include "backend/cuda/internode_ll/home.cuh"
#include "backend/cuda/internode_ll_nodes/nodes.hpp"

// Overloads of what the kernels of low latency do with ranks, for ranks of several nodes. To a far
// one a message is composed in the mirror and put, with a word of its own that says which ticket is
// here: puts need no order among themselves. Calls are no different on either side but for that.
namespace deep_ep::cuda::internode_ll {

template <class Args>
concept Puts = Args::kPuts;

__device__ bool is_far(const Puts auto& args, int rank) { return args.comm.bases[rank] == nullptr; }

// --- what this rank sends -----------------------------------------------------------------

__device__ inline const FarArea& far_area(const Nodes& nodes, Area area) {
  return area == Area::kMessages ? nodes.shape.messages : nodes.shape.returns;
}
__device__ inline std::byte* mirror_of(const Nodes& nodes, const Ticket& ticket, int rank) {
  return nodes.far.mirror + nodes.far.stripe(ticket.part, rank);
}

__device__ Packet* call_to(const Puts auto& args, const Ticket& ticket, int rank, int part) {
  if (!is_far(args, rank)) return call_to(static_cast<const StepArgs&>(args), ticket, rank, part);
  return reinterpret_cast<Packet*>(mirror_of(args.nodes, ticket, rank)) + part;
}
__device__ Packet* counts_to(const Puts auto& args, const Ticket& ticket, int rank) {
  if (!is_far(args, rank)) return counts_to(static_cast<const StepArgs&>(args), ticket, rank);
  return call_to(args, ticket, rank, plan::kCallPackets);
}
__device__ Packet* head_to(const Puts auto& args, const Ticket& ticket, Area area, int rank,
                           std::int64_t message) {
  if (!is_far(args, rank))
    return head_to(static_cast<const StepArgs&>(args), ticket, area, rank, message);
  return reinterpret_cast<Packet*>(mirror_of(args.nodes, ticket, rank) +
                                   far_area(args.nodes, area).at(message));
}
__device__ std::byte* plain_row_to(const Puts auto& args, const Ticket& ticket, Area area, int rank,
                                   std::int64_t message) {
  if (!is_far(args, rank))
    return plain_row_to(static_cast<const StepArgs&>(args), ticket, area, rank, message);
  const FarArea& far = far_area(args.nodes, area);
  return mirror_of(args.nodes, ticket, rank) + far.at(message) + far.head_bytes;
}

/// By a warp: a part of the mirror to the same part of this rank's stripe there. What it holds is
/// written again by the ticket after the next, behind the word that this one has been received.
__device__ __noinline__ inline void put(const Nodes& nodes, const Ticket& ticket, int rank,
                                        std::int64_t at, std::int64_t bytes, std::int64_t word) {
  const FarLayout& far = nodes.far;
  const int self = nodes.rails.rank();
  nvshmemx_putmem_signal_nbi_warp(
      far.inbox + far.stripe(ticket.part, self) + at, mirror_of(nodes, ticket, rank) + at,
      static_cast<std::size_t>(bytes), far.words_of(ticket.part, self) + word, ticket.number,
      NVSHMEM_SIGNAL_SET, rank);
}
__device__ void put_call(const Puts auto& args, const Ticket& ticket, int rank) {
  if (!is_far(args, rank)) return;
  // What each lane wrote is visible to who puts it, a network's adapter too.
  fence_acq_rel_sys();
  __syncwarp();
  put(args.nodes, ticket, rank, 0, args.nodes.shape.call_bytes, 0);
}
/// Behind a fence of whoever wrote it.
__device__ void put_message(const Puts auto& args, const Ticket& ticket, Area area, int rank,
                            std::int64_t message) {
  const FarArea& far = far_area(args.nodes, area);
  put(args.nodes, ticket, rank, far.at(message), far.bytes, far.first_word + message);
}

// --- what comes ---------------------------------------------------------------------------

/// Packets of this rank's memory. Those of a far rank are complete once its word has the ticket.
struct FarPackets {
  const Packet* packets;
  std::uint64_t* word;  // null: each says by its tag that it is here
  std::uint64_t ticket;

  __device__ FarPackets operator+(int i) const { return {packets + i, word, ticket}; }
};

using cuda::take_packet;
/// acquire: of a far rank's, pairs with its put.
__device__ inline bool take_packet(const FarPackets& from, std::uint32_t tag, Packet& packet) {
  if (from.word != nullptr && !internode::reached(from.word, from.ticket)) return false;
  return cuda::take_packet(from.packets, tag, packet);
}
__device__ inline void acquire(const FarPackets& from) { acquire(from.packets); }

/// What a far rank puts from `at` on, told by its word number `word`.
__device__ inline FarPackets far_packets(const Nodes& nodes, const Ticket& ticket, int source,
                                         std::int64_t at, std::int64_t word) {
  const FarLayout& far = nodes.far;
  return {reinterpret_cast<const Packet*>(far.inbox + far.stripe(ticket.part, source) + at),
          far.words_of(ticket.part, source) + word, ticket.number};
}
__device__ FarPackets call_from(const Puts auto& args, const Ticket& ticket, int source) {
  if (!is_far(args, source))
    return {call_from(static_cast<const StepArgs&>(args), ticket, source), nullptr, 0};
  return far_packets(args.nodes, ticket, source, 0, 0);
}
__device__ FarPackets counts_from(const Puts auto& args, const Ticket& ticket, int source,
                                  int number) {
  if (!is_far(args, source))
    return {counts_from(static_cast<const StepArgs&>(args), ticket, source, number), nullptr, 0};
  return far_packets(args.nodes, ticket, source, 0, 0) + (plan::kCallPackets + number);
}
__device__ FarPackets head_from(const Puts auto& args, const Ticket& ticket, Area area, int source,
                                std::int64_t message) {
  if (!is_far(args, source))
    return {head_from(static_cast<const StepArgs&>(args), ticket, area, source, message), nullptr,
            0};
  const FarArea& far = far_area(args.nodes, area);
  return far_packets(args.nodes, ticket, source, far.at(message), far.first_word + message);
}
__device__ const std::byte* plain_row_from(const Puts auto& args, const Ticket& ticket, Area area,
                                           int source, std::int64_t message) {
  if (!is_far(args, source))
    return plain_row_from(static_cast<const StepArgs&>(args), ticket, area, source, message);
  const FarArea& far = far_area(args.nodes, area);
  return args.nodes.far.inbox + args.nodes.far.stripe(ticket.part, source) + far.at(message) +
         far.head_bytes;
}

/// As row_places.cuh has it; out of line, where it takes registers from nobody.
__device__ __noinline__ bool count_rows_before(const Puts auto& args, const Ticket& ticket,
                                               int source, int expert, std::int32_t& rows) {
  const Announced announced(args.shared, args.comm.num_ranks);
#pragma unroll 1
  for (int i = 0; i < source; ++i) {
    if (announced.messages[i] == 0) continue;
    Packet packet = {};
    const FarPackets from = counts_from(args, ticket, i, expert / 3);
    const Arrival arrival = take_packet(from, ticket.tag, packet)
                                ? Arrival::kHere
                                : await_packet(args, i, from, ticket.tag, packet);
    if (arrival == Arrival::kFailed) return false;
    if (arrival == Arrival::kHere) rows += static_cast<std::int32_t>(packet.words[expert % 3]);
  }
  return true;
}

// --- waiting and faults -------------------------------------------------------------------

/// Ranks of this node are seen to go by the host, those of others when they say so.
__device__ __noinline__ inline Arrival go_on_over_nodes(const Nodes& nodes, std::int32_t* masks,
                                                        int rank, Wait what, std::uint64_t expected,
                                                        Waiting& waiting) {
  const Comm& comm = nodes.node.comm;
  const plan::Topology& topology = nodes.rails.shape.topology;
  if (waiting.started == 0) {
    waiting.started = globaltimer();
    return Arrival::kHere;
  }
  if (internode::faulted(comm, nodes.rails)) return Arrival::kFailed;
  if (masks != nullptr && protocol::load_relaxed(&masks[rank]) != 0) return Arrival::kAbsent;
  std::uint32_t gone = 0;
  bool expired = false;
  if (topology.node_of(rank) == nodes.rails.node) {
    DeviceWaiter waiter{comm, topology.index_of(rank), waiting.started};
    expired = waiter.expired();
    if (waiter.gone) gone = comm.status->gone[topology.index_of(rank)];
  } else {
    internode::RailWaiter waiter{comm, nodes.rails, rank, waiting.started};
    expired = waiter.expired();
    if (waiter.gone) gone = kGoneOrderly;
  }
  if (!expired) return Arrival::kHere;
  // As on one node.
  if (!waiting.expired) {
    waiting.expired = true;
    return Arrival::kHere;
  }
  if (masks != nullptr) {
    protocol::store_relaxed(&masks[rank], std::int32_t{1});
    return Arrival::kAbsent;
  }
  raise_missing(comm, rank, gone, what, expected, 0);
  return Arrival::kFailed;
}
__device__ Arrival go_on(const Puts auto& args, int rank, Wait what, std::uint64_t expected,
                         Waiting& waiting) {
  return go_on_over_nodes(args.nodes, args.masks, rank, what, expected, waiting);
}

// What finds something wrong tells it to the ranks of this node; those of others see what the
// kernel's end tells them.

__device__ void raise_bad_id(const Puts auto& args, std::int64_t token) {
  raise_bad_id(args.nodes.node, token);
}
__device__ bool count_token(const Puts auto& args, std::int64_t token, std::int32_t* messages,
                            std::int32_t* rows) {
  return count_token(args.nodes.node, token, messages, rows);
}
__device__ bool holds(const Puts auto& args, int source, const Claim& claim) {
  if (claim.of == claim.token) return true;
  raise(args.nodes.node.comm, Finding::kOtherRouting, kInvalidArgumentCode, source, claim.token,
        claim.expert, claim.row, claim.of);
  return false;
}
/// By a thread of the warp that has seen the source's packets.
__device__ __noinline__ bool agrees_with(const Puts auto& args, const Ticket& ticket, int source) {
  const Packet* from = call_from(args, ticket, source).packets;
  protocol::CallRecord theirs = {};
  auto* words = reinterpret_cast<std::uint32_t*>(&theirs);
  Packet packet;
#pragma unroll 1
  for (int word = 0; word < kRecordWords; ++word) {
    (void)cuda::take_packet(from + 1 + word / 3, ticket.tag, packet);
    words[word] = packet.words[word % 3];
  }
  return agrees(args.nodes.node.comm, args.comm.record, theirs, source);
}

// --- beginning and end --------------------------------------------------------------------

/// acquire: pairs with tell_consumed() of `rank`.
__device__ bool has_consumed(const Puts auto& args, int rank, int part, std::uint64_t ticket) {
  protocol::EpochFlag& flag = args.layout.consumed[part * args.comm.num_ranks + rank];
  return is_far(args, rank) ? internode::reached(&flag.value, ticket) : flag.reached(ticket);
}

__device__ bool may_begin(const Puts auto& args, const Ticket& ticket, const BeginWords& words) {
  const Comm& comm = args.nodes.node.comm;
  if (words.fault != protocol::FaultRecord::kNone || internode::faulted(comm, args.nodes.rails))
    return false;
  if (!args.sends) return true;
  if (ticket.live) {
    if (lane_id() == 0)
      raise_invalid(comm, Finding::kThirdLive, static_cast<std::int64_t>(ticket.number - 2));
    return false;
  }
  if (ticket.number <= args.first_ticket + 2) return true;
  bool good = true;
#pragma unroll 1
  for (int i = lane_id(); good && i < args.comm.num_ranks; i += 32) {
    good = await(args, i, Wait::kConsumed, ticket.number - 2, [&] {
             return has_consumed(args, i, ticket.part, ticket.number - 2);
           }) != Arrival::kFailed;
  }
  return good;
}

/// By one warp of block 0, as on one node. A far rank that is masked is told once it is let in
/// again: nothing may be put to one that has died.
__device__ void tell_consumed(const Puts auto& args) {
  LowLatencyState& state = args.comm.local->low_latency;
  const int ranks = args.comm.num_ranks;
#pragma unroll 1
  for (int part = 0; part < LowLatencyState::kParts; ++part) {
    const std::uint64_t consumed = state.consumed[part];
    const bool news = state.told[part] != consumed;
    bool behind = news;
#pragma unroll 1
    for (int i = lane_id(); i < ranks; i += 32)
      behind = behind || (is_far(args, i) && args.nodes.told[part * ranks + i] != consumed);
    if (!__any_sync(0xffffffff, behind)) continue;
    if (news) scrub(args, part, consumed);
    // What was read and scrubbed comes before what tells it.
    fence_acq_rel_sys();
    __syncwarp();
#pragma unroll 1
    for (int i = lane_id(); i < ranks; i += 32) {
      protocol::EpochFlag* own = args.layout.consumed + part * ranks + args.comm.rank;
      std::uint64_t& told = args.nodes.told[part * ranks + i];
      if (!is_far(args, i)) {
        if (news) place_at(args, 0, own, i)->publish(consumed);
      } else if (told != consumed && !is_masked(args, i)) {
        // release: pairs with the acquire in has_consumed() of that rank. It has seen the one
        // before, so that two are never under way.
        nvshmemx_signal_op(&own->value, consumed, NVSHMEM_SIGNAL_SET, i);
        told = consumed;
      }
    }
    if (lane_id() == 0) state.told[part] = consumed;
    __syncwarp();
  }
}

/// By all blocks, at their end.
__device__ void end_step(const Puts auto& args, const Ticket& ticket, bool good) {
  const Nodes& nodes = args.nodes;
  count(args, ticket);
  if (!good && threadIdx.x == 0) {
    mirror_fault(nodes.node.comm);
    internode::tell_fault_once(nodes.node.comm, nodes.rails);
  }
  if (args.wait_stats == nullptr || !args.receives || !is_last_block(args.comm)) return;
  flush_waits(args.comm, args.wait_stats);
  if (threadIdx.x == 0) args.comm.local->blocks_done = 0;
}

}  // namespace deep_ep::cuda::internode_ll
