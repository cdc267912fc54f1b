#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/internode/arrival.cuh"
#include "backend/cuda/internode/turns.cuh"
#include "backend/cuda/intranode/exchange.cuh"

namespace deep_ep::cuda::internode {

namespace {

// Of both kinds, those that send and those that pass on, each block has some, so that one block is
// enough. Neither kind waits for the other.
constexpr int kThreads = 2 * kRoleWarps * 32;

struct Shared {
  Stage::Storage stages[2 * kRoleWarps];
  Blocks targets;
  unsigned long long own_taken;  // of the block's parts of rows for this node
};
static_assert(sizeof(Shared) <= kMaxSharedBytes);

// --- sending -------------------------------------------------------------------------------------

__device__ plan::SourceMeta meta_of(const DispatchArgs& args, std::int64_t token,
                                    const Positions& positions) {
  return {args.rails.node, static_cast<std::int32_t>(token), positions.ranks()};
}

__device__ const std::int32_t* positions_of(const DispatchArgs& args, std::int64_t token,
                                            int node) {
  const plan::Topology& topology = args.rails.shape.topology;
  return args.work.send_head + token * topology.num_ranks + topology.rank_of(node, 0);
}

__device__ Ids ids_of(const DispatchArgs& args, std::int64_t token) {
  Ids ids = args.topk_idx;
  const std::int64_t at = token * args.comm.record.num_topk * (ids.wide ? 8 : 4);
  if (ids.data != nullptr) ids.data = static_cast<const std::byte*>(ids.data) + at;
  return ids;
}

/// By a warp of either role that has nothing better to do: the next part of the block's rows for
/// ranks of this node. False if there is none.
__device__ bool place_own(const DispatchArgs& args, Shared& shared, Stage& stage, Untold& untold) {
  const Rails& rails = args.rails;
  const Blocks& targets = shared.targets;
  const auto part = plan::part_of(targets.records, rails.node);
  const std::int64_t own = (part.end - part.begin) * args.item.pieces;
  unsigned long long ticket = 0;
  if (lane_id() == 0) ticket = atomicAdd(&shared.own_taken, 1ULL);
  ticket = __shfl_sync(0xffffffff, ticket, 0);
  const std::int64_t number = static_cast<std::int64_t>(ticket) * gridDim.x + blockIdx.x;
  if (number >= own) return false;
  const auto record = static_cast<std::int32_t>(number / args.item.pieces);
  const auto piece = static_cast<int>(number % args.item.pieces);
  const std::int64_t token =
      args.work.record_tokens[rails.node * args.comm.record.num_tokens + record];
  stage.load(args.x + token * args.format.x_bytes + args.item.x_begin(piece),
             args.item.x_size(piece));
  untold.tell();
  const Positions positions(positions_of(args, token, rails.node), args.comm.num_ranks);
  const float* weights = args.topk_weights;
  place(args, targets,
        {rails.rank(), meta_of(args, token, positions), record, positions, ids_of(args, token),
         weights == nullptr ? nullptr : weights + token * args.comm.record.num_topk,
         args.scales.data == nullptr ? nullptr : args.scales.data + token * args.scales.row_stride,
         args.scales.column_stride, args.item.x_begin(piece)},
        stage, [] {});
  return true;
}

/// By a warp: all of an item but x.
__device__ void compose_head(const DispatchArgs& args, std::int64_t token, int node,
                             std::int32_t record, std::byte* to) {
  const plan::RecordFormat& format = args.record_format;
  const Positions positions(positions_of(args, token, node), args.comm.num_ranks);
  const plan::SourceMeta meta = meta_of(args, token, positions);
  if (lane_id() == 0) *reinterpret_cast<plan::RecordHead*>(to) = {meta, record, 0};
  auto* heads = reinterpret_cast<std::int32_t*>(to + sizeof(plan::RecordHead));
#pragma unroll
  for (int set = 0; set < kRanksALane; ++set) {
    const int rank = set * 32 + lane_id();
    if (rank < args.comm.num_ranks) heads[rank] = positions.at[set];
  }
  const auto copy_words = [&](const void* from, std::int64_t bytes, std::byte* out) {
    const auto* words = static_cast<const std::uint32_t*>(from);
    for (std::int64_t i = lane_id(); i < bytes / 4; i += 32)
      reinterpret_cast<std::uint32_t*>(out)[i] = words[i];
  };
  copy_words(ids_of(args, token).data, args.format.topk_idx_bytes, to + format.topk_idx);
  copy_words(args.topk_weights + token * args.comm.record.num_topk, args.format.topk_weights_bytes,
             to + format.topk_weights);
  auto* scales = reinterpret_cast<std::uint32_t*>(to + format.scales);
  for (std::int64_t s = lane_id(); s < args.format.scale_bytes / 4; s += 32)
    scales[s] = args.scales.data[token * args.scales.row_stride + s * args.scales.column_stride];
}

/// By a warp: 16 bytes a lane and step, several steps under way at once. Not inlined, as put_out().
__device__ __noinline__ void copy_part(std::byte* to, const std::byte* from, std::int64_t bytes) {
  constexpr int kUnroll = 8;
  std::int64_t at = lane_id() * 16;
  for (; at + (kUnroll - 1) * 512 < bytes; at += kUnroll * 512) {
    uint4 words[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      words[i] = *reinterpret_cast<const uint4*>(from + at + i * 512);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) *reinterpret_cast<uint4*>(to + at + i * 512) = words[i];
  }
  for (; at < bytes; at += 512)
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
}

/// By a warp: the next item of a ring, if there is room.
__device__ Turn send_item(const DispatchArgs& args, Stage& stage, Untold& untold, int lane,
                          int peer) {
  const Rails& rails = args.rails;
  const ItemShape& item = args.item;
  const RingItems items(rails, item, rails.state.lanes_out, lane, peer);
  const std::int64_t number = items_out(rails.state.rings[items.ring]);
  const std::uint64_t in_flight = items_in_flight(rails, items.ring);
  const bool done = number == items.count;
  if (done || in_flight >= static_cast<std::uint64_t>(item.slots)) {
    untold.tell();
    return done && in_flight == 0 ? Turn::kDone : Turn::kStuck;
  }
  const auto record = static_cast<std::int32_t>(items.record + number / item.pieces);
  const auto piece = static_cast<int>(number % item.pieces);
  const std::int64_t token =
      args.work.record_tokens[items.node * args.comm.record.num_tokens + record];
  const std::byte* x = args.x + token * args.format.x_bytes + item.x_begin(piece);
  const std::int64_t x_size = item.x_size(piece);
  const OutItem out(rails, item, lane, peer);
  const bool direct = out.there != nullptr;
  if (direct) stage.load(x, x_size);
  compose_head(args, token, items.node, record, out.to);
  if (direct) {
    stage.wait();
    if (lane_id() == 0) stage.store(out.to + item.head_bytes);
    stage.stored();
    untold.tell<1>();  // of the item before
  } else {
    copy_part(out.to + item.head_bytes, x, x_size);
  }
  send_out(rails, out, untold, lane, peer, item.head_bytes + x_size);
  return Turn::kMoved;
}

// --- passing on ----------------------------------------------------------------------------------

/// By a warp: the next item of a ring, if it is here.
__device__ Turn pass_on_item(const DispatchArgs& args, const Blocks& targets, Stage& stage,
                             int lane, int peer) {
  const Rails& rails = args.rails;
  const ItemShape& item = args.item;
  const plan::RecordFormat& format = args.record_format;
  const RingItems items(rails, item, rails.state.lanes_in, lane, peer);
  const std::int64_t number = items_in(rails.state.rings[items.ring]);
  if (number == items.count) return Turn::kDone;
  const std::byte* from = next_item(rails, item, lane, peer);
  if (from == nullptr) return Turn::kStuck;
  if (lane_id() == 0) fence_proxy_async_global();
  const auto piece = static_cast<int>(number % item.pieces);
  stage.load(from + item.head_bytes, item.x_size(piece));
  const plan::RecordHead head = *reinterpret_cast<const plan::RecordHead*>(from);
  place(args, targets,
        {rails.rank_of_peer(peer), head.meta, head.record,
         Positions(reinterpret_cast<const std::int32_t*>(from + sizeof head), args.comm.num_ranks),
         Ids{from + format.topk_idx, args.topk_idx.wide},
         reinterpret_cast<const float*>(from + format.topk_weights),
         reinterpret_cast<const std::uint32_t*>(from + format.scales), 1, item.x_begin(piece)},
        stage, [&] { release_item(rails, lane, peer); });
  return Turn::kMoved;
}

/// By a warp of either role: its rings, and rows for this node while none of them moves.
__device__ void move_rows(const DispatchArgs& args, Shared& shared, Stage& stage) {
  const Rails& rails = args.rails;
  const bool sends = threadIdx.x < kRoleWarps * 32;
  const Role role(sends ? 0 : kRoleWarps, kRoleWarps);
  if (sends) {
    begin_rings<&RailState::Ring::out_begin, &RailState::Ring::sent>(rails, role);
  } else {
    begin_rings<&RailState::Ring::in_begin, &RailState::Ring::consumed>(rails, role);
  }
  Untold untold;
  (void)serve_rings(
      args.comm, rails, role,
      [&](int lane, int peer) {
        return sends ? send_item(args, stage, untold, lane, peer)
                     : pass_on_item(args, shared.targets, stage, lane, peer);
      },
      [&] { return place_own(args, shared, stage, untold); },
      [&](std::int64_t ring) {
        if (sends) return missing_room(rails, ring);
        const std::uint64_t consumed = rails.state.rings[ring].consumed;
        return Awaited{Wait::kRows, consumed + 1, consumed};
      });
}

// --- this rank's results -------------------------------------------------------------------------

/// Rows behind the received ones, which no peer writes.
__device__ void fill_unused_rows(const DispatchArgs& args, const plan::RecvArrays& own) {
  const int all = args.rails.shape.topology.num_ranks;
  const std::int64_t received =
      args.rails.state.prefix[(std::int64_t{args.comm.rank} + 1) * all - 1];
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  const std::int64_t begin = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  const auto fill = [&](void* array, std::int64_t row_bytes, std::uint32_t value) {
    const std::int64_t words = row_bytes / 4;
    auto* to = static_cast<std::uint32_t*>(array);
    for (std::int64_t i = received * words + begin; i < args.block_rows * words; i += step)
      to[i] = value;
  };
  fill(own.topk_idx, args.format.topk_idx_bytes, 0xffffffff);
  fill(own.topk_weights, args.format.topk_weights_bytes, 0);
  fill(own.src_idx, 4, 0xffffffff);
  fill(own.src_meta, args.format.src_meta_bytes, 0xffffffff);
}

}  // namespace

// See notify.cu.
__global__ void __launch_bounds__(kThreads, 1) dispatch(const __grid_constant__ DispatchArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  Blocks& targets = shared.targets;
  const Comm& comm = args.comm;
  const std::uint64_t epoch = comm.local->epoch + 1;
  if (threadIdx.x == 0) shared.own_taken = 0;
  const bool good = find_blocks(args, epoch, targets, [&](int rank, auto rows, auto room) {
    return check_rows_fit(comm, comm.global_rank(rank), 0, rows, room);
  });
  if (good) {
    fill_unused_rows(args, targets.of[comm.rank]);
    Stage stage(shared.stages[threadIdx.x / 32]);
    move_rows(args, shared, stage);
    stage.finish();
    if (threadIdx.x % 32 == 0) nvshmem_quiet();
  } else {
    void_block(comm, args, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  }
  if (!is_last_block(comm)) return;
  bool complete =
      __syncthreads_and(good && may_start(comm)) != 0 && intranode::exchange_landed(comm, epoch);
  complete = __syncthreads_and(complete && may_start(comm)) != 0;
  if (complete) {
    flush_waits(comm, args.wait_stats == nullptr ? nullptr : args.wait_stats + comm.first_rank);
  } else {
    void_block(comm, args, 0, 1);  // what other blocks wrote, too
    tell_fault(comm, args.rails);
  }
  end_kernel(comm);
}

cudaError_t load_dispatch() { return load<dispatch>(); }

cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream) {
  constexpr int kShared = sizeof(Shared);
  const cudaError_t allowed = allow_shared<dispatch>(kShared);
  if (allowed != cudaSuccess) return allowed;
  // Warps wait for those of other ranks, so that all blocks must fit: one an SM.
  dispatch<<<num_sms, kThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::internode
