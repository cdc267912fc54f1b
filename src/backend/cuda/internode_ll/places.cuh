#pragma once

#include "backend/cuda/internode_ll/steps.hpp"
#include "backend/cuda/internode_ll/ticket.cuh"

// Where messages lie: at the rank that they are for while they are written, and here when they are
// read. These are the answers while all ranks map each other's memory. Of ranks that do not
// (internode_ll_nodes/far.cuh) they are written elsewhere and put, and have a word that says that
// they are here.
namespace deep_ep::cuda::internode_ll {

using plan::MessageArea;

/// Which of a call's messages.
enum class Area : std::uint8_t { kMessages, kReturns };

__device__ inline const MessageArea& area_of(const StepArgs& args, Area area) {
  return area == Area::kMessages ? args.places.messages : args.places.returns;
}

/// Whether `rank` does not map this rank's memory, or the other way round: then its rows never
/// travel in packets.
__device__ constexpr bool is_far(const StepArgs&, int) { return false; }

// --- what this rank sends to `rank` -------------------------------------------------------

__device__ inline Packet* call_to(const StepArgs& args, const Ticket& ticket, int rank, int part) {
  return place_at(args, ticket.packet_shift, args.places.call(args.comm.rank) + part, rank);
}
__device__ inline Packet* counts_to(const StepArgs& args, const Ticket& ticket, int rank) {
  return place_at(args, ticket.packet_shift, args.places.count(args.comm.rank), rank);
}
__device__ inline Packet* head_to(const StepArgs& args, const Ticket& ticket, Area area, int rank,
                                  std::int64_t message) {
  return place_at(args, ticket.packet_shift, area_of(args, area).head(args.comm.rank, message),
                  rank);
}
__device__ inline std::byte* plain_row_to(const StepArgs& args, const Ticket& ticket, Area area,
                                          int rank, std::int64_t message) {
  return place_at(args, ticket.plain_shift, area_of(args, area).plain_row(args.comm.rank, message),
                  rank);
}

// By a warp, which wrote it: what is not yet where it is for goes there.

__device__ inline void put_call(const StepArgs&, const Ticket&, int) {}
__device__ inline void put_message(const StepArgs&, const Ticket&, Area, int, std::int64_t) {}

// --- what comes from `source` -------------------------------------------------------------

__device__ inline const Packet* call_from(const StepArgs& args, const Ticket& ticket, int source) {
  return place_here(ticket.packet_shift, args.places.call(source));
}
__device__ inline const Packet* counts_from(const StepArgs& args, const Ticket& ticket, int source,
                                            int number) {
  return place_here(ticket.packet_shift, args.places.count(source) + number);
}
__device__ inline const Packet* head_from(const StepArgs& args, const Ticket& ticket, Area area,
                                          int source, std::int64_t message) {
  return place_here(ticket.packet_shift, area_of(args, area).head(source, message));
}
/// Behind the acquire of its head.
__device__ inline const std::byte* plain_row_from(const StepArgs& args, const Ticket& ticket,
                                                  Area area, int source, std::int64_t message) {
  return place_here(ticket.plain_shift, area_of(args, area).plain_row(source, message));
}
/// Of a packet that has been taken: what its source wrote before it is visible.
__device__ inline void acquire(const Packet* packet) { load_acquire_sys_b128(packet); }

}  // namespace deep_ep::cuda::internode_ll
