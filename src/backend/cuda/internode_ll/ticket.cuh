#pragma once

#include <algorithm>

#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/packets.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/internode_ll/forms.hpp"
#include "backend/cuda/internode_ll/steps.hpp"

// What the steps of low latency have in common: which call a kernel belongs to, where its messages
// lie, waiting for them, and how a kernel begins and ends. A kernel runs once through code that no
// cache holds, so code that is seldom needed is kept out of line.
namespace deep_ep::cuda::internode_ll {

using plan::Packet;

// A block moves one token's row at a time, and must have done a lot by then that costs the same
// with many threads as with few.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Registers allow so many; all of a kernel must run at once, since they wait for other ranks. What
// puts takes more of them.
template <class Args>
constexpr int kBlocksAnSm = Args::kPuts ? 1 : 2;

/// Blocks with something to do, if all ranks have so many tokens and `shared` blocks share a row: a
/// token each, a message each, the books, and the counts.
inline std::int64_t num_busy_blocks(const StepArgs& args, std::int64_t tokens, int shared) {
  return tokens * (args.comm.num_ranks + 1) * shared + 2;
}

/// Blocks of a kernel: all that fit, unless there can never be that much to do side by side. Of few
/// tokens one an SM, since other ranks may have more.
template <class Args>
unsigned num_blocks(const Args& args, int num_sms, int shared) {
  constexpr unsigned kSystemBytes = 1024;
  const int here =
      std::min<int>(kBlocksAnSm<Args>, kMaxSharedBytes / (args.shared.used + kSystemBytes));
  const std::int64_t most = num_busy_blocks(args, args.shape.max_tokens, shared);
  const std::int64_t likely =
      std::max<std::int64_t>(num_busy_blocks(args, args.num_tokens, shared), num_sms);
  return static_cast<unsigned>(std::min<std::int64_t>(
      {std::int64_t{num_sms} * std::max(here, 1), likely, most, LowLatencyState::kMaxBlocks}));
}

/// Launches an instantiation of a kernel, which is of this form.
template <auto kKernel, Form kForm, class Args>
cudaError_t launch_form(const Args& args, unsigned blocks, cudaStream_t stream) {
  const cudaError_t status = allow_shared<kKernel>(kMaxSharedBytes);
  if (status != cudaSuccess) return status;
  if (args.shared.used > kMaxSharedBytes) return cudaErrorInvalidValue;
  return launch_kernel(kKernel, blocks, kThreads, args.shared.used, stream,
                       Formed<Args, kForm>{args});
}

/// Whether a warp that takes 32 of `count` at a time takes those from `base` on.
template <class Args>
__device__ bool takes_from(const Args&, int base, int count) {
  return base == 0 || (!Args::kFew && base < count);
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x / 32); }

/// A place in the block's dynamic shared memory.
template <class T>
__device__ T* shared_at(std::uint32_t offset) {
  extern __shared__ __align__(128) std::byte shared_memory[];
  return reinterpret_cast<T*>(shared_memory + offset);
}

/// The call of a kernel, the same in all its blocks.
struct Ticket {
  std::uint64_t number;
  std::uint32_t tag;
  int part;
  bool live;                  // the call before the last has not been received
  bool keeps_own;             // what this rank has for itself goes no way through memory
  std::int64_t packet_shift;  // from the places of even tickets
  std::int64_t plain_shift;
};

/// What a ticket is made of, on its way before anybody waits for it.
struct TicketWords {
  LowLatencyState::Block state;
  std::uint64_t given = 0;  // by the sending step

  __device__ explicit TicketWords(const StepArgs& args)
      : state(args.comm.local->low_latency.blocks[blockIdx.x]),
        given(args.sends ? 0 : *args.ticket) {}
};

__device__ inline Ticket take_ticket(const StepArgs& args, const TicketWords& words) {
  const bool combine = args.kind == plan::LowLatencyKind::kCombine;
  const LowLatencyState::Block& state = words.state;
  Ticket ticket;
  ticket.number = args.sends ? (combine ? state.sent[1] : state.sent[0]) + 1 : words.given;
  ticket.tag = plan::packet_tag(args.kind, ticket.number);
  ticket.part = plan::LowLatencyLayout::part(args.kind, ticket.number);
  const bool odd = ticket.number % 2 != 0;
  ticket.live = (combine ? (odd ? state.live[3] : state.live[2])
                         : (odd ? state.live[1] : state.live[0])) != 0;
  ticket.packet_shift = odd ? args.layout.packet_part_bytes : 0;
  ticket.plain_shift = odd ? args.layout.plain_part_bytes : 0;
  ticket.keeps_own = false;
  return ticket;
}

/// The i-th rank from this one on, which comes first: what moves between GPUs begins with the next
/// one and ends here, what is waited for the other way round.
__device__ inline int rank_from_own(const StepArgs& args, int i) {
  const int rank = args.comm.rank + i;
  return rank < args.comm.num_ranks ? rank : rank - args.comm.num_ranks;
}

/// Where `own`, a place of this rank of even tickets, lies at `rank` for this ticket.
template <class T>
__device__ T* place_at(const StepArgs& args, std::int64_t shift, T* own, int rank) {
  const std::int64_t there = args.comm.bases[rank] - args.comm.bases[args.comm.rank];
  return reinterpret_cast<T*>(reinterpret_cast<std::byte*>(own) + shift + there);
}
template <class T>
__device__ T* place_here(std::int64_t shift, T* own) {
  return reinterpret_cast<T*>(reinterpret_cast<std::byte*>(own) + shift);
}

__device__ inline bool is_masked(const StepArgs& args, int rank) {
  return args.masks != nullptr && protocol::load_relaxed(&args.masks[rank]) != 0;
}

/// Whether a token's block can keep what goes to its own rank, if it has but one: it is there when
/// that is taken. Masks of the own rank change between kernels only.
__device__ inline bool can_keep_own(const StepArgs& args) {
  return args.sends && args.receives && !is_masked(args, args.comm.rank);
}

// --- waiting ---------------------------------------------------------------------------

enum class Arrival { kHere, kAbsent, kFailed };

/// A wait that lasts.
struct Waiting {
  std::int64_t started = 0;
  bool expired = false;  // one more look was due
};

/// Now and then while a wait for `rank` lasts: whether it goes on (kHere). A rank that does not
/// come is masked, if the Buffer may shrink; else it is a fault.
__device__ __noinline__ inline Arrival go_on(const StepArgs& args, int rank, Wait what,
                                             std::uint64_t expected, Waiting& waiting) {
  DeviceWaiter waiter{args.comm, rank};
  if (waiting.started == 0) {
    waiter.begin();
    waiting.started = waiter.started;
    return Arrival::kHere;
  }
  waiter.started = waiting.started;
  if (protocol::load_relaxed(&args.fault->state) == protocol::FaultRecord::kWritten)
    return Arrival::kFailed;
  if (is_masked(args, rank)) return Arrival::kAbsent;
  if (!waiter.expired()) return Arrival::kHere;
  // Ranks may share a GPU by time slices: one that slept through its own deadline looks once more.
  if (!waiting.expired) {
    waiting.expired = true;
    return Arrival::kHere;
  }
  if (args.masks != nullptr) {
    protocol::store_relaxed(&args.masks[rank], std::int32_t{1});
    return Arrival::kAbsent;
  }
  raise_missing(args.comm, rank, waiter.gone ? args.comm.status->gone[rank] : 0, what, expected, 0);
  return Arrival::kFailed;
}

/// Waits until ready(), for what `rank` does.
template <class Ready>
__device__ __forceinline__ Arrival await(const auto& args, int rank, Wait what,
                                         std::uint64_t expected, Ready&& ready) {
  constexpr int kTurns = 32;  // looks from one question whether to go on to the next
  if (is_masked(args, rank)) return Arrival::kAbsent;
  const long long begin = args.wait_stats == nullptr ? 0 : clock64();
  Arrival arrival = Arrival::kHere;
  Waiting waiting;
#pragma unroll 1
  for (int turn = 1; !ready(); ++turn) {
    if (turn % kTurns == 0) arrival = go_on(args, rank, what, expected, waiting);
    if (arrival != Arrival::kHere) break;
  }
  if (args.wait_stats != nullptr) note_wait(args.comm, rank, begin);
  return arrival;
}

/// `from`: a place of a packet, as places.cuh gives it.
__device__ __forceinline__ Arrival await_packet(const auto& args, int rank, const auto& from,
                                                std::uint32_t tag, Packet& packet) {
  return await(args, rank, Wait::kRows, tag, [&] { return take_packet(from, tag, packet); });
}

// --- beginning and end -----------------------------------------------------------------

/// What a kernel asks before it begins, on its way while its ticket is.
struct BeginWords {
  std::uint32_t fault = protocol::FaultRecord::kNone;
  std::uint64_t consumed[2] = {};  // by the lane's rank, of either parity, as noted

  __device__ explicit BeginWords(const StepArgs& args) {
    if (warp_id() != kWarps - 1) return;
    // Relaxed: of a fault nothing is read here.
    fault = protocol::load_relaxed(&args.fault->state);
    if (!args.sends || lane_id() >= args.comm.num_ranks) return;
    const std::uint64_t* freed = args.comm.local->low_latency.freed;
    // Both parities, before the ticket is known.
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
      consumed[odd] =
          freed[(static_cast<int>(args.kind) * 2 + odd) * args.comm.num_ranks + lane_id()];
  }
};

/// By the last warp: waits until all ranks have read what the ticket's memory had before.
__device__ __noinline__ inline bool await_consumed(const StepArgs& args, const Ticket& ticket) {
  bool good = true;
#pragma unroll 1
  for (int i = lane_id(); good && i < args.comm.num_ranks; i += 32) {
    const protocol::EpochFlag& flag = args.layout.consumed[ticket.part * args.comm.num_ranks + i];
    // acquire: pairs with the release in tell_consumed() of that rank.
    good = await(args, i, Wait::kConsumed, ticket.number - 2,
                 [&] { return flag.reached(ticket.number - 2); }) != Arrival::kFailed;
  }
  return good;
}

/// By the last warp, before the block's first store: nothing failed before, the ticket may be sent,
/// and its memory at the other ranks is free. Joined by the caller.
__device__ inline bool may_begin(const StepArgs& args, const Ticket& ticket,
                                 const BeginWords& words) {
  const Comm& comm = args.comm;
  bool good = words.fault == protocol::FaultRecord::kNone;
  if (!args.sends) return good;
  if (ticket.live) {
    if (lane_id() == 0)
      raise_invalid(comm, Finding::kThirdLive, static_cast<std::int64_t>(ticket.number - 2));
    return false;
  }
  if (ticket.number <= args.first_ticket + 2) return good;
  const bool freed =
      lane_id() >= comm.num_ranks ||
      (ticket.part % 2 != 0 ? words.consumed[1] : words.consumed[0]) >= ticket.number - 2;
  if (comm.num_ranks <= 32 && __all_sync(0xffffffff, freed)) return good;
  return await_consumed(args, ticket) && good;
}

/// By the last warp of block 0, at its end: what the other ranks are known to have consumed, for
/// the next kernel, which need not wait for a fence then.
__device__ inline void note_freed(const StepArgs& args) {
  const int count = LowLatencyState::kParts * args.comm.num_ranks;
#pragma unroll 1
  for (int i = lane_id(); i < count; i += 32) {
    // acquire: pairs with the release in tell_consumed() of that rank. What sends to it is a later
    // kernel of this stream.
    args.comm.local->low_latency.freed[i] = protocol::load_acquire(&args.layout.consumed[i].value);
  }
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
#pragma unroll 1
  for (std::int64_t i = begin + lane_id(); i < begin + length && i < packets; i += 32)
    memory[i].tag = 0;
}

// Block 0 keeps the rank's books: it alone notes at a kernel's end what has been received and tells
// it at the next one's beginning, so that no kernel can tell what it is still reading. Tokens begin
// with block 1.
__device__ inline bool keeps_books() { return blockIdx.x == 0; }
// The last one counts over all tokens, for the other ranks.
__device__ inline bool counts_for_others() { return blockIdx.x == gridDim.x - 1; }
__device__ inline std::int64_t first_token() {
  return keeps_books() ? gridDim.x - 1 : blockIdx.x - 1;
}
/// The same of what comes behind `taken` others, which the first blocks after block 0 have.
__device__ inline unsigned first_behind(unsigned taken) {
  const unsigned skipped = taken + 1 < gridDim.x ? taken + 1 : (taken + 1) % gridDim.x;
  return blockIdx.x >= skipped ? blockIdx.x - skipped : blockIdx.x + gridDim.x - skipped;
}

/// By one warp of block 0, before anything that waits: tells the sources what earlier kernels of
/// this rank have received. So a ticket's memory is read for the last time before its reader's next
/// kernel begins (I15), and no kernel has to wait at its end until all its blocks have read.
__device__ inline void tell_consumed(const StepArgs& args) {
  const Comm& comm = args.comm;
  LowLatencyState& state = comm.local->low_latency;
  const int mine = lane_id() % LowLatencyState::kParts;
  const std::uint64_t noted = state.consumed[mine];
  const unsigned news = __ballot_sync(0xffffffff, state.told[mine] != noted);
#pragma unroll 1
  for (int part = 0; part < LowLatencyState::kParts; ++part) {
    if ((news >> part & 1) == 0) continue;
    const std::uint64_t consumed = __shfl_sync(0xffffffff, noted, part);
    scrub(args, part, consumed);
    __syncwarp();
#pragma unroll 1
    for (int i = lane_id(); i < comm.num_ranks; i += 32) {
      protocol::EpochFlag* own = args.layout.consumed + part * comm.num_ranks + comm.rank;
      // release: pairs with the acquire in note_freed() or await_consumed() of that rank.
      place_at(args, 0, own, i)->publish(consumed);
    }
    __syncwarp();
    if (lane_id() == 0) state.told[part] = consumed;
  }
}

/// By one thread: counts the ticket for a block.
__device__ inline void count_for(const StepArgs& args, const Ticket& ticket, unsigned block) {
  LowLatencyState::Block& state = args.comm.local->low_latency.blocks[block];
  if (args.sends) state.sent[static_cast<int>(args.kind)] = ticket.number;
  state.live[ticket.part] = args.receives ? 0 : 1;
}

/// By the last but one warp of block 0, at any time: counts for the blocks that are not there.
__device__ inline void count_for_absent(const StepArgs& args, const Ticket& ticket) {
#pragma unroll 1
  for (unsigned i = gridDim.x + lane_id(); i < LowLatencyState::kMaxBlocks; i += 32)
    count_for(args, ticket, i);
}

/// By all blocks, at their end: counts what the kernel has done.
__device__ inline void count(const StepArgs& args, const Ticket& ticket) {
  LowLatencyState& state = args.comm.local->low_latency;
  if (threadIdx.x != 0) return;
  count_for(args, ticket, blockIdx.x);
  if (!keeps_books()) return;
  if (args.receives) state.consumed[ticket.part] = ticket.number;
  if (!args.receives) *args.ticket = ticket.number;
}

/// By all blocks, at their end. `good`: nothing failed that this block has seen.
__device__ inline void end_step(const StepArgs& args, const Ticket& ticket, bool good) {
  const Comm& comm = args.comm;
  count(args, ticket);
  if (keeps_books() && warp_id() == kWarps - 1) note_freed(args);
  if (!good && threadIdx.x == 0) mirror_fault(comm);
  if (args.wait_stats == nullptr || !args.receives || !is_last_block(comm)) return;
  flush_waits(comm, args.wait_stats);
  if (threadIdx.x == 0) comm.local->blocks_done = 0;
}

}  // namespace deep_ep::cuda::internode_ll
