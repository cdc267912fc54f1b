#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/places.cuh"
#include "backend/cuda/intranode/exchange.cuh"
#include "backend/cuda/intranode/rows.cuh"

namespace deep_ep::cuda::intranode {

namespace {

// Warps that move what is small (scales, topk, the handle): word by word, so that they wait for
// memory most of the time, beside those that move x. The first one finds the receivers, also if
// there is nothing small.
constexpr int kSmallWarps = 8;
constexpr int kMaxRanksALane = (kMaxRanks + 31) / 32;
constexpr int kMaxThreads = (kRowWarps + kSmallWarps) * 32;

/// Where this rank's rows go at one receiver.
struct Target {
  plan::RecvArrays arrays;
  plan::HandleArrays handle;  // null if it has one
  int num_channels;
  std::int32_t first_slot;
  std::int32_t num_rows;
};

struct Shared {
  Target targets[kMaxRanks];
  protocol::CallRecord record;  // with the hash of the handle's routing
  Place own;                    // of this rank's results
};
/// All of a block's; kRanksALane: for up to 32 times as many ranks.
template <int kRanksALane>
struct RowShared {
  typename RowPump<kRanksALane>::Storage rows[kRowWarps];
  typename RowQueue<kRanksALane>::Heads heads[kRowWarps];
  Shared rest;
};

__device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

/// By one thread: true, and `target` filled, if rank `i` agrees and this rank's rows fit there.
__device__ bool find_target(const DispatchArgs& args, std::uint64_t epoch,
                            const protocol::CallRecord& record, int i, Target& target) {
  const Comm& comm = args.comm;
  Place place;
  std::byte* base = wait_place(comm, epoch, record, i, place);
  if (base == nullptr) return false;
  const auto rows = plan::rows_from(args.rank_prefix_matrix, comm.rank, i, comm.num_ranks);
  Carver carver(base);
  std::byte* x =
      place.x_segment < 0 ? nullptr : segment_base(comm, i, place.x_segment) + place.x_offset;
  target.arrays = plan::RecvArrays::carve(carver, args.format, place.rows, x);
  target.first_slot = static_cast<std::int32_t>(rows.begin);
  target.num_rows = static_cast<std::int32_t>(rows.end - rows.begin);
  target.num_channels = place.num_channels;
  if (place.num_channels > 0) {
    Carver handle(segment_base(comm, i, place.handle_segment) + place.handle_offset);
    target.handle =
        plan::HandleArrays::carve(handle, place.rows, comm.num_ranks, place.num_channels);
  }
  return check_rows_fit(comm, i, rows.begin, rows.end - rows.begin, place.rows);
}

/// By one warp: every receiver's place is known and fits; false in a lane: not.
__device__ bool find_targets(const DispatchArgs& args, std::uint64_t epoch, Shared& shared) {
  const Comm& comm = args.comm;
  // Loaded here, looked at when there is nothing else to wait for.
  const std::uint32_t fault = protocol::load_relaxed(&comm.control(comm.rank).block.fault->state);
  const std::uint64_t hash = args.cached ? warp_hash(args.rank_prefix_matrix, comm.num_ranks) : 0;
  if (lane() == 0) {
    shared.record = comm.record;
    shared.record.routing_hash = hash;
    shared.own = {.segment = args.block_segment,
                  .num_channels = args.fills_handle ? args.num_channels : 0,
                  .offset = args.block_offset,
                  .rows = args.block_rows,
                  .handle_segment = args.handle_segment,
                  .x_segment = args.x_segment,
                  .handle_offset = args.handle_offset,
                  .x_offset = args.x_offset};
  }
  __syncwarp();
  if (blockIdx.x == 0) publish_place(comm, epoch, shared.record, shared.own, lane(), 32);
  bool good = true;
  for (int i = lane(); good && i < comm.num_ranks; i += 32)
    good = find_target(args, epoch, shared.record, i, shared.targets[i]);
  return good && fault == protocol::FaultRecord::kNone;
}

/// The slot of a token's row at `rank`, or -1; a position that the handle's matrix does not know is
/// reported, and the row not sent.
__device__ std::int32_t slot_of(const DispatchArgs& args, const Shared& shared, std::int64_t token,
                                int rank) {
  const std::int32_t head = args.send_head[token * args.comm.num_ranks + rank];
  if (head == -1) return -1;
  const Target& target = shared.targets[rank];
  if (head >= 0 && head < target.num_rows) return target.first_slot + head;
  raise_invalid(args.comm, Finding::kBadPosition, token, rank, head, target.num_rows);
  return -1;
}

// --- x ---------------------------------------------------------------------------------

/// Where a piece goes at the ranks that a lane looks after, null: nowhere.
template <int kRanksALane>
struct PiecePlaces {
  std::byte* to[kRanksALane];
  std::uint32_t bytes;
};

/// What a lane knows of its ranks, once it is known where they want their rows. Only this rank
/// writes these slots, behind wait_place() (I5).
template <int kRanksALane>
class LaneTargets {
 public:
  __device__ LaneTargets(const DispatchArgs& args, const Shared& shared)
      : args_(args), row_bytes_(static_cast<std::uint32_t>(args.format.x_bytes)) {
#pragma unroll
    for (int set = 0; set < kRanksALane; ++set) {
      const int rank = set * 32 + lane();
      if (rank >= args.comm.num_ranks) continue;
      const Target& target = shared.targets[rank];
      rows_[set] = target.arrays.x + target.first_slot * args.format.x_bytes;
      num_rows_[set] = target.num_rows;
    }
  }

  __device__ PiecePlaces<kRanksALane> operator()(const RowNote<kRanksALane>& note,
                                                 bool there) const {
    PiecePlaces<kRanksALane> places;
    places.bytes = note.bytes;
#pragma unroll
    for (int set = 0; set < kRanksALane; ++set) {
      const std::int32_t head = there ? note.head[set] : -1;
      const bool known = static_cast<std::uint32_t>(head) < num_rows_[set];
      places.to[set] =
          known
              ? rows_[set] + std::uint64_t{static_cast<std::uint32_t>(head)} * row_bytes_ + note.at
              : nullptr;
      if (head != -1 && !known)
        raise_invalid(args_.comm, Finding::kBadPosition, note.token, set * 32 + lane(), head,
                      num_rows_[set]);
    }
    return places;
  }

 private:
  const DispatchArgs& args_;
  std::uint32_t row_bytes_;
  std::byte* rows_[kRanksALane] = {};
  std::uint32_t num_rows_[kRanksALane] = {};
};

/// By a row warp: its share of x, which is on its way here before it is known where it goes.
/// Returns what the block has agreed on: whether that is known.
template <int kRanksALane>
__device__ bool send_rows(const DispatchArgs& args, RowShared<kRanksALane>& shared, int warp) {
  RowQueue<kRanksALane> queue(args, share_of(args, warp), shared.heads[warp]);
  RowPump<kRanksALane> pump(shared.rows[warp]);
  pump.start(queue);
  if (!barrier_and(true)) {
    pump.drop();
    return false;
  }
  pump.run(queue, LaneTargets<kRanksALane>(args, shared.rest),
           [](const std::byte* from, const PiecePlaces<kRanksALane>& places) {
#pragma unroll
             for (std::byte* to : places.to) {
               if (to != nullptr) bulk_store(to, from, places.bytes);
             }
           });
  return true;
}

// --- the rest of a row -----------------------------------------------------------------

/// One entry of a token's topk at each receiver: ids become local ones; entries for experts of
/// other ranks become -1 with weight 0. Entry 0 also says which token it is.
__device__ void send_entry(const DispatchArgs& args, const Shared& shared, std::int64_t token,
                           int k) {
  const int topk = args.comm.record.num_topk;
  const bool has_entry = k < topk;
  const std::int64_t id = has_entry ? args.topk_idx[token * topk + k] : -1;
  const float weight =
      has_entry && args.topk_weights != nullptr ? args.topk_weights[token * topk + k] : 0.0f;
  const int local_experts = args.comm.record.num_experts / args.comm.num_ranks;
  // Ids that came with counts of another call were not looked at yet.
  if (args.cached && (id < -1 || id >= args.comm.record.num_experts))
    raise_invalid(args.comm, Finding::kBadExpert, token, k, id, args.comm.record.num_experts);
#pragma unroll 4
  for (int rank = 0; rank < args.comm.num_ranks; ++rank) {
    const std::int64_t slot = slot_of(args, shared, token, rank);
    const std::int64_t local = id - std::int64_t{rank} * local_experts;
    const bool here = id >= 0 && local >= 0 && local < local_experts;
    if (slot < 0) {
      if (here && args.cached) raise_invalid(args.comm, Finding::kNotInRank, token, k, id, rank);
      continue;
    }
    const Target& to = shared.targets[rank];
    if (k == 0) to.handle.recv_src_idx[slot] = static_cast<std::int32_t>(token);
    if (!has_entry) continue;
    const std::int64_t at = slot * topk + k;
    if (args.topk_idx.wide) {
      reinterpret_cast<std::int64_t*>(to.arrays.topk_idx)[at] = here ? local : -1;
    } else {
      reinterpret_cast<std::int32_t*>(to.arrays.topk_idx)[at] =
          here ? static_cast<std::int32_t>(local) : -1;
    }
    if (args.topk_weights != nullptr)
      reinterpret_cast<float*>(to.arrays.topk_weights)[at] = here ? weight : 0.0f;
  }
}

/// By a warp: several tokens at a time, a lane an entry.
__device__ void send_topk(const DispatchArgs& args, const Shared& shared, std::int64_t warp,
                          std::int64_t warps) {
  // Without topk there is still the token's index to send.
  const int topk = args.comm.record.num_topk > 0 ? args.comm.record.num_topk : 1;
  int width = 1;  // lanes of a token
  while (width < topk && width < 32) width *= 2;
  const std::int64_t tokens = args.comm.record.num_tokens;
  const int together = 32 / width;
  for (std::int64_t base = warp * together; base < tokens; base += warps * together) {
    const std::int64_t token = base + lane() / width;
    if (token >= tokens) continue;
    for (int k = lane() % width; k < topk; k += width) send_entry(args, shared, token, k);
  }
}

/// By a warp: its tokens' scales, two tokens at a time.
__device__ void send_scales(const DispatchArgs& args, const Shared& shared, std::int64_t warp,
                            std::int64_t warps) {
  constexpr int kTogether = 2;
  const std::int64_t tokens = args.comm.record.num_tokens;
  const int scales = args.comm.record.num_scales;
  for (std::int64_t base = warp * kTogether; base < tokens; base += warps * kTogether) {
    for (int s = lane(); s < scales; s += 32) {
      std::uint32_t words[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        words[i] =
            base + i < tokens
                ? args.scales
                      .data[(base + i) * args.scales.row_stride + s * args.scales.column_stride]
                : 0;
      }
      for (int rank = 0; rank < args.comm.num_ranks; ++rank) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const std::int64_t slot = base + i < tokens ? slot_of(args, shared, base + i, rank) : -1;
          if (slot >= 0)
            reinterpret_cast<std::uint32_t*>(
                shared.targets[rank].arrays.scales)[slot * scales + s] = words[i];
        }
      }
    }
  }
}

/// By a warp: the rows of this rank's channels at one receiver, one channel: as many as come before
/// the first row of a token at or behind the channel's beginning.
__device__ void send_channel(const DispatchArgs& args, const Target& to, int rank, int channel) {
  const Comm& comm = args.comm;
  const std::int64_t tokens = comm.record.num_tokens;
  std::int32_t before = to.num_rows;
  for (std::int64_t base = plan::channel_begin(tokens, channel, to.num_channels); base < tokens;
       base += 32) {
    const std::int64_t token = base + lane();
    const std::int32_t head = token < tokens ? args.send_head[token * comm.num_ranks + rank] : -1;
    const std::uint32_t set = __ballot_sync(0xffffffff, head >= 0);
    if (set == 0) continue;
    before = __shfl_sync(0xffffffff, head, __ffs(set) - 1);
    break;
  }
  if (lane() == 0)
    to.handle.recv_channel_prefix_matrix[comm.rank * to.num_channels + channel] = before;
}

__host__ __device__ bool has_small(const DispatchArgs& args) {
  return args.fills_handle || args.scales.data != nullptr;
}

/// By a small warp: its share of everything but x.
__device__ void send_small(const DispatchArgs& args, const Shared& shared) {
  const int warps_here = static_cast<int>(blockDim.x / 32) - kRowWarps;
  const std::int64_t warps = std::int64_t{gridDim.x} * warps_here;
  const std::int64_t warp = (std::int64_t{threadIdx.x / 32} - kRowWarps) * gridDim.x + blockIdx.x;
  if (args.scales.data != nullptr) send_scales(args, shared, warp, warps);
  if (!args.fills_handle) return;
  send_topk(args, shared, warp, warps);
  std::int64_t unit = 0;
  for (int rank = 0; rank < args.comm.num_ranks; ++rank) {
    for (int channel = 0; channel < shared.targets[rank].num_channels; ++channel, ++unit) {
      if (unit % warps == warp) send_channel(args, shared.targets[rank], rank, channel);
    }
  }
}

__device__ std::int64_t num_received(const DispatchArgs& args) {
  const int ranks = args.comm.num_ranks;
  return plan::rows_from(args.rank_prefix_matrix, ranks - 1, args.comm.rank, ranks).end;
}

/// Rows behind the received ones, which no peer writes.
__device__ void fill_unused_rows(const DispatchArgs& args, const plan::RecvArrays& own) {
  const std::int64_t received = num_received(args);
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t begin = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  const std::int64_t unused = args.block_rows - received;
  if (args.fills_handle) {
    for (std::int64_t i = begin; i < unused; i += step) args.recv_src_idx[received + i] = -1;
  }
  const std::int64_t id_words = args.format.topk_idx_bytes / 4;
  for (std::int64_t i = begin; i < unused * id_words; i += step) {
    reinterpret_cast<std::int32_t*>(own.topk_idx)[received * id_words + i] = -1;
  }
  const std::int64_t weights = args.format.topk_weights_bytes / 4;
  for (std::int64_t i = begin; i < unused * weights; i += step) {
    reinterpret_cast<float*>(own.topk_weights)[received * weights + i] = 0.0f;
  }
}

/// By all threads of `blocks` blocks.
__device__ void void_results(const DispatchArgs& args, int block, int blocks) {
  void_block(args.comm, args, block, blocks);
  if (!args.fills_handle) return;
  const std::int64_t step = std::int64_t{blocks} * blockDim.x;
  const std::int64_t begin = block * std::int64_t{blockDim.x} + threadIdx.x;
  for (std::int64_t i = begin; i < args.block_rows; i += step) args.recv_src_idx[i] = -1;
}

template <int kRanksALane>
__global__ void __launch_bounds__(kMaxThreads, 1)
    dispatch(const __grid_constant__ DispatchArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  auto& all = *reinterpret_cast<RowShared<kRanksALane>*>(memory);
  Shared& shared = all.rest;
  const Comm& comm = args.comm;
  wait_for_kernel_before();
  // The others wait for this rank's place, which comes with the kernel that has room.
  if (args.tentative && num_received(args) > args.block_rows) return;
  const std::uint64_t epoch = comm.local->epoch + 1;
  const int warp = threadIdx.x / 32;
  bool good;
  if (warp < kRowWarps) {
    good = send_rows(args, all, warp);
  } else {
    good = barrier_and(warp != kRowWarps || find_targets(args, epoch, shared));
    if (good && has_small(args)) send_small(args, shared);
  }
  if (good) {
    fill_unused_rows(args, shared.targets[comm.rank].arrays);
  } else {
    void_results(args, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  }
  if (!is_last_block(comm, good)) return;
  // A block that left, and a row that was not sent, have left a fault behind: then nothing has
  // landed.
  const bool complete =
      __syncthreads_and(good && no_fault_here(comm)) != 0 && exchange_landed(comm, epoch);
  if (complete) {
    flush_waits(comm, args.wait_stats);
  } else {
    void_results(args, 0, 1);  // what other blocks wrote, too
  }
  end_kernel(comm, epoch, complete);
}

template <int kRanksALane>
cudaError_t launch(const DispatchArgs& args, int num_sms, cudaStream_t stream) {
  constexpr int kShared = sizeof(RowShared<kRanksALane>);
  static_assert(kShared <= kMaxSharedBytes);
  const cudaError_t allowed = allow_shared<dispatch<kRanksALane>>(kShared);
  if (allowed != cudaSuccess) return allowed;
  const int threads = has_small(args) ? kMaxThreads : (kRowWarps + 1) * 32;
  return launch_kernel(dispatch<kRanksALane>, num_sms, threads, kShared, stream, args);
}

}  // namespace

cudaError_t load_dispatch() { return load<dispatch<1>, dispatch<kMaxRanksALane>>(); }

cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream) {
  return args.comm.num_ranks <= 32 ? launch<1>(args, num_sms, stream)
                                   : launch<kMaxRanksALane>(args, num_sms, stream);
}

}  // namespace deep_ep::cuda::intranode
