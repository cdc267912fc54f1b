#pragma once

#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/internode_ll/steps.hpp"

// What the steps of low latency have in common: which call a kernel belongs to, where its messages
// lie, waiting for them, and how a kernel ends.
namespace deep_ep::cuda::internode_ll {

using plan::Packet;

// Enough threads for the rows of one token, and registers for each.
constexpr int kThreads = 512;

/// The call of a kernel, the same in all its blocks.
struct Ticket {
  std::uint64_t number;
  std::uint32_t tag;
  int part;
  bool live;                  // the call before the last has not been received
  std::int64_t packet_shift;  // from the places of even tickets
  std::int64_t plain_shift;
};

__device__ inline Ticket take_ticket(const StepArgs& args) {
  const auto kind = static_cast<int>(args.kind);
  const LowLatencyState::Block state = args.comm.local->low_latency.blocks[blockIdx.x];
  const std::uint64_t sent = kind == 0 ? state.sent[0] : state.sent[1];
  Ticket ticket;
  ticket.number = args.sends ? sent + 1 : *args.ticket;
  ticket.tag = plan::packet_tag(args.kind, ticket.number);
  ticket.part = plan::LowLatencyLayout::part(args.kind, ticket.number);
  const bool odd = ticket.number % 2 != 0;
  ticket.live = (kind == 0 ? (odd ? state.live[1] : state.live[0])
                           : (odd ? state.live[3] : state.live[2])) != 0;
  ticket.packet_shift = odd ? args.layout.packet_part_bytes : 0;
  ticket.plain_shift = odd ? args.layout.plain_part_bytes : 0;
  return ticket;
}

/// Where `own`, a place of this rank of even tickets, lies at `rank` for this ticket.
template <class T>
__device__ T* place_at(const StepArgs& args, std::int64_t shift, T* own, int rank) {
  const std::int64_t there = args.comm.bases[rank] - args.comm.bases[args.comm.rank];
  return reinterpret_cast<T*>(reinterpret_cast<std::byte*>(own) + shift + there);
}

// --- packets ---------------------------------------------------------------------------

__device__ inline void send_packet(Packet* to, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                   std::uint32_t tag) {
  store_relaxed_sys_b128(to, {std::uint64_t{b} << 32 | a, std::uint64_t{tag} << 32 | c});
}

/// True, and the packet, if it is of the call.
__device__ inline bool take_packet(const Packet* from, std::uint32_t tag, Packet& packet) {
  const Words16 words = load_relaxed_sys_b128(from);
  packet.words[0] = static_cast<std::uint32_t>(words.low);
  packet.words[1] = static_cast<std::uint32_t>(words.low >> 32);
  packet.words[2] = static_cast<std::uint32_t>(words.high);
  return static_cast<std::uint32_t>(words.high >> 32) == tag;
}

/// 48 bytes of a row: three units of 16, or four packets.
struct Group {
  static constexpr int kUnits = plan::MessageArea::kGroupBytes / 16;
  uint4 units[kUnits];
};

__device__ inline void send_group(Packet* to, const Group& group, std::uint32_t tag) {
  const auto* words = reinterpret_cast<const std::uint32_t*>(group.units);
#pragma unroll
  for (int i = 0; i < plan::MessageArea::kGroupPackets; ++i) {
    send_packet(to + i, words[3 * i], words[3 * i + 1], words[3 * i + 2], tag);
  }
}

__device__ inline bool take_group(const Packet* from, std::uint32_t tag, Group& group) {
  auto* words = reinterpret_cast<std::uint32_t*>(group.units);
  bool here = true;
#pragma unroll
  for (int i = 0; i < plan::MessageArea::kGroupPackets; ++i) {
    Packet packet;
    here = take_packet(from + i, tag, packet) && here;
    for (int w = 0; w < 3; ++w) words[3 * i + w] = packet.words[w];
  }
  return here;
}

// --- waiting ---------------------------------------------------------------------------

enum class Arrival { kHere, kAbsent, kFailed };

__device__ inline bool is_masked(const StepArgs& args, int rank) {
  return args.masks != nullptr && protocol::load_relaxed(&args.masks[rank]) != 0;
}

/// With enable_shrink a wait ends when another thread has given the rank up.
struct ShrinkingWaiter : DeviceWaiter {
  const StepArgs& args;
  __device__ ShrinkingWaiter(const StepArgs& step, int rank)
      : DeviceWaiter{step.comm, rank}, args(step) {}
  __device__ bool expired() { return is_masked(args, awaited) || DeviceWaiter::expired(); }
};

/// Waits until ready(), for what `rank` does. A rank that does not come is masked, if the Buffer
/// may shrink; else it is a fault.
template <class Ready>
__device__ Arrival await(const StepArgs& args, int rank, Wait what, std::uint64_t expected,
                         Ready&& ready) {
  if (is_masked(args, rank)) return Arrival::kAbsent;
  ShrinkingWaiter waiter(args, rank);
  const long long begin = args.wait_stats == nullptr ? 0 : clock64();
  const protocol::WaitResult result = protocol::wait_until(waiter, ready);
  if (args.wait_stats != nullptr) {
    atomicMax(&args.comm.local->waited[rank], static_cast<unsigned long long>(clock64() - begin));
  }
  if (result == protocol::WaitResult::kReady) return Arrival::kHere;
  if (result == protocol::WaitResult::kFaulted) return Arrival::kFailed;
  if (args.masks != nullptr) {
    protocol::store_relaxed(&args.masks[rank], std::int32_t{1});
    return Arrival::kAbsent;
  }
  raise_missing(args.comm, rank, waiter.gone, what, expected, 0);
  return Arrival::kFailed;
}

__device__ inline Arrival await_packet(const StepArgs& args, int rank, const Packet* from,
                                       std::uint32_t tag, Packet& packet) {
  return await(args, rank, Wait::kRows, tag, [&] { return take_packet(from, tag, packet); });
}

/// By the threads of a block before their first store of this ticket: its memory at the other ranks
/// is free. False: a fault.
__device__ inline bool await_consumed(const StepArgs& args, const Ticket& ticket) {
  bool good = true;
  if (ticket.number > args.first_ticket + 2) {
    for (int i = threadIdx.x; good && i < args.comm.num_ranks; i += blockDim.x) {
      const protocol::EpochFlag& flag = args.layout.consumed[ticket.part * args.comm.num_ranks + i];
      // acquire: pairs with the release in tell_consumed() of rank i.
      good = await(args, i, Wait::kConsumed, ticket.number - 2,
                   [&] { return flag.reached(ticket.number - 2); }) != Arrival::kFailed;
    }
  }
  return good;
}

// --- beginning and end -----------------------------------------------------------------

/// By each thread, to be joined by all of a block: this kernel may do its work.
__device__ inline bool may_begin(const StepArgs& args, const Ticket& ticket) {
  if (threadIdx.x != 0) return true;
  if (!may_start(args.comm)) return false;
  if (!args.sends || !ticket.live) return true;
  raise_invalid(args.comm, Finding::kThirdLive, static_cast<std::int64_t>(ticket.number - 2));
  return false;
}

/// A stripe of the packets of a part is cleared, so that none keeps its tag until the tag returns.
/// Its ticket has been received, and the sources do not know yet: nobody reads or writes there.
__device__ inline void scrub(const StepArgs& args, int part, std::uint64_t ticket) {
  constexpr std::int64_t kStripes = 1 << 16;
  const std::int64_t packets = args.layout.packet_part_bytes / std::int64_t{sizeof(Packet)};
  const std::int64_t length = (packets + kStripes - 1) / kStripes;
  const std::int64_t begin = static_cast<std::int64_t>(ticket / 2 % kStripes) * length;
  auto* memory =
      reinterpret_cast<Packet*>(args.layout.packets + part * args.layout.packet_part_bytes);
  for (std::int64_t i = begin + threadIdx.x; i < begin + length && i < packets; i += blockDim.x)
    memory[i].tag = 0;
}

/// By the threads of one block: tells the sources what earlier kernels of this rank have received.
/// So a ticket's memory is read for the last time before its reader's next kernel begins, and no
/// kernel has to wait at its end until all its blocks have read.
__device__ inline void tell_consumed(const StepArgs& args) {
  const Comm& comm = args.comm;
  constexpr int kParts = LowLatencyState::kParts;
  LowLatencyState& state = comm.local->low_latency;
  for (int part = 0; part < kParts; ++part) {
    if (state.told[part] != state.consumed[part]) scrub(args, part, state.consumed[part]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kParts * comm.num_ranks; i += blockDim.x) {
    const int part = i % kParts;
    if (state.told[part] == state.consumed[part]) continue;
    protocol::EpochFlag* own = args.layout.consumed + part * comm.num_ranks + comm.rank;
    // release: pairs with the acquire in await_consumed() of that rank.
    place_at(args, 0, own, i / kParts)->publish(state.consumed[part]);
  }
  __syncthreads();
  if (threadIdx.x < kParts) state.told[threadIdx.x] = state.consumed[threadIdx.x];
}

/// By all blocks: counts what the kernel has done.
__device__ inline void count(const StepArgs& args, const Ticket& ticket) {
  LowLatencyState& state = args.comm.local->low_latency;
  // Block 0 also for the blocks that are not there.
  int block = static_cast<int>(blockIdx.x);
  if (block == 0 && threadIdx.x > 0) block = static_cast<int>(gridDim.x + threadIdx.x) - 1;
  if ((blockIdx.x > 0 && threadIdx.x > 0) || block >= LowLatencyState::kMaxBlocks) return;
  if (args.sends) state.blocks[block].sent[static_cast<int>(args.kind)] = ticket.number;
  state.blocks[block].live[ticket.part] = args.receives ? 0 : 1;
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  if (args.receives) state.consumed[ticket.part] = ticket.number;
  if (!args.receives) *args.ticket = ticket.number;
}

/// By all blocks, at their end. `good`: nothing failed that this block has seen.
__device__ inline void end_step(const StepArgs& args, const Ticket& ticket, bool good) {
  const Comm& comm = args.comm;
  __syncthreads();
  count(args, ticket);
  if (!good && threadIdx.x == 0) mirror_fault(comm);
  if (args.wait_stats == nullptr || !args.receives || !is_last_block(comm)) return;
  flush_waits(comm, args.wait_stats);
  if (threadIdx.x == 0) comm.local->blocks_done = 0;
}

}  // namespace deep_ep::cuda::internode_ll
