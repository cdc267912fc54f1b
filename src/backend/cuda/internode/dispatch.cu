#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/internode/arrival.cuh"
#include "backend/cuda/internode/turns.cuh"
#include "backend/cuda/intranode/exchange.cuh"

namespace deep_ep::cuda::internode {

namespace {

// Of both kinds, those that send and those that pass on, each block has some, so that one block is
// enough. Neither kind waits for the other. One more tells peers what these have done.
constexpr int kThreads = (kRailWarps + 1) * 32;

struct Shared {
  Stage::Storage stages[kRailWarps];
  Blocks targets;
  RailShared rails;
  unsigned own_taken;  // of the block's parts of rows for this node
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
__device__ bool place_own(const DispatchArgs& args, Shared& shared, Stage& stage, Teller& teller) {
  const Rails& rails = args.rails;
  const Blocks& targets = shared.targets;
  const auto part = plan::part_of(targets.records, rails.node);
  const std::int64_t own = (part.end - part.begin) * args.item.pieces;
  unsigned ticket = 0;
  if (lane_id() == 0) ticket = atomicAdd(&shared.own_taken, 1U);
  ticket = __shfl_sync(0xffffffff, ticket, 0);
  const std::int64_t number = std::int64_t{ticket} * gridDim.x + blockIdx.x;
  if (number >= own) return false;
  const auto record = static_cast<std::int32_t>(number / args.item.pieces);
  const auto piece = static_cast<int>(number % args.item.pieces);
  const std::int64_t token =
      args.work.record_tokens[rails.node * args.comm.record.num_tokens + record];
  teller.tell_now();
  const Positions positions(positions_of(args, token, rails.node), args.comm.num_ranks);
  const float* weights = args.topk_weights;
  place(args, targets,
        {rails.rank(), meta_of(args, token, positions), record, positions, ids_of(args, token),
         weights == nullptr ? nullptr : weights + token * args.comm.record.num_topk,
         args.scales.data == nullptr ? nullptr : args.scales.data + token * args.scales.row_stride,
         args.scales.column_stride, args.x + token * args.format.x_bytes + args.item.x_begin(piece),
         piece},
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
__device__ Turn send_item(const DispatchArgs& args, const MappedPeers& peers, Stage& stage,
                          Teller& teller, RingOut& end) {
  const Rails& rails = args.rails;
  const ItemShape& item = args.item;
  Turn turn;
  if (!may_put(rails, peers, item, teller, end, turn)) return turn;
  const std::int64_t token =
      args.work.record_tokens[end.node(rails) * args.comm.record.num_tokens + end.record];
  const std::byte* x = args.x + token * args.format.x_bytes + item.x_begin(end.piece);
  const std::int64_t x_size = item.x_size(end.piece);
  const OutItem out(rails, peers, item, end);
  // The stores of the item before are read meanwhile.
  compose_head(args, token, end.node(rails), end.record, out.to);
  if (out.direct) {
    stage.load(x, x_size);
    stage.load_rest();
    stage.pass(
        [&](int share) {
          if (lane_id() == 0) stage.store(out.to + item.head_bytes, share);
        },
        [] {});
    teller.tell_now<Stage::kShares>();  // of the item before
  } else {
    copy_part(out.to + item.head_bytes, x, x_size);
  }
  send_out(rails, peers, item, out, teller, end, item.head_bytes + x_size);
  return turn;
}

// --- passing on ----------------------------------------------------------------------------------

/// By a warp: the next item of a ring, if it is here.
__device__ Turn pass_on_item(const DispatchArgs& args, const Shared& shared, Stage& stage,
                             Teller& teller, RingIn& end) {
  const Rails& rails = args.rails;
  const ItemShape& item = args.item;
  const plan::RecordFormat& format = args.record_format;
  if (end.left == 0) return Turn::kDone;
  const std::byte* from =
      next_item(rails, shared.rails.peers, item, end.ring(rails), end.peer, end.items, end.slot);
  if (from == nullptr) return Turn::kStuck;
  if (lane_id() == 0) fence_proxy_async_global();
  const plan::RecordHead head = *reinterpret_cast<const plan::RecordHead*>(from);
  place(args, shared.targets,
        {rails.rank_of_peer(end.peer), head.meta, head.record,
         Positions(reinterpret_cast<const std::int32_t*>(from + sizeof head), args.comm.num_ranks),
         Ids{from + format.topk_idx, args.topk_idx.wide},
         reinterpret_cast<const float*>(from + format.topk_weights),
         reinterpret_cast<const std::uint32_t*>(from + format.scales), 1, from + item.head_bytes,
         end.piece},
        stage, [&] {
          end.advance(item);
          release_item(rails, shared.rails.peers, teller, end.lane, end.peer, end.items);
        });
  return Turn::kMoved;
}

/// By a warp of either role: its rings, and rows for this node while none of them moves.
__device__ void move_rows(const DispatchArgs& args, Shared& shared) {
  const Rails& rails = args.rails;
  const auto warp = static_cast<int>(threadIdx.x / 32);
  Stage stage(shared.stages[warp]);
  Teller teller(shared.rails.untold[warp]);
  bool own_left = true;
  const auto rest = [&] { return own_left = own_left && place_own(args, shared, stage, teller); };
  if (warp < kRoleWarps) {
    const Role role(warp);
    begin_rings<&RailState::Ring::out_begin, &RailState::Ring::sent>(rails, role);
    (void)serve_rings<RingOut>(
        args.comm, rails, args.item, rails.state.lanes_out, role,
        [&](RingOut& end) { return send_item(args, shared.rails.peers, stage, teller, end); }, rest,
        [&](std::int64_t ring) { return missing_room(rails, ring); });
  } else {
    const Role role(warp - kRoleWarps);
    begin_rings<&RailState::Ring::in_begin, &RailState::Ring::consumed>(rails, role);
    (void)serve_rings<RingIn>(
        args.comm, rails, args.item, rails.state.lanes_in, role,
        [&](RingIn& end) { return pass_on_item(args, shared, stage, teller, end); }, rest,
        [&](std::int64_t ring) {
          const std::uint64_t consumed = rails.state.rings[ring].consumed;
          return Awaited{Wait::kRows, consumed + 1, consumed};
        });
  }
  teller.end();
  stage.finish();
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
  if (threadIdx.x == 0) {
    shared.own_taken = 0;
    find_own(args, targets);
  }
  shared.rails.begin(args.rails);
  wait_for_kernel_before();
  const std::uint64_t epoch = comm.local->epoch + 1;
  const bool good = find_blocks(args, epoch, targets, [&](int rank, auto rows, auto room) {
    return check_rows_fit(comm, comm.global_rank(rank), 0, rows, room);
  });
  if (good) {
    fill_unused_rows(args, targets.of[comm.rank]);
    if (threadIdx.x < kRailWarps * 32) {
      move_rows(args, shared);
    } else {
      tell_peers(shared.rails);
    }
    if (threadIdx.x % 32 == 0) shared.rails.peers.quiet(args.rails);
  } else {
    void_block(comm, args, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  }
  if (!is_last_block(comm)) return;
  const bool complete = good && all_landed(comm, epoch);
  if (complete) {
    if (threadIdx.x == 32) {
      const Crossing rows(args.rails);
      count_rows(args.rails, args.item, rows.out, rows.in);
    }
    flush_waits(comm, args.wait_stats == nullptr ? nullptr : args.wait_stats + comm.first_rank);
  } else {
    void_block(comm, args, 0, 1);  // what other blocks wrote, too
    tell_fault(comm, args.rails);
  }
  end_kernel(comm, complete);
}

cudaError_t load_dispatch() { return load<dispatch>(); }

cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream) {
  constexpr int kShared = sizeof(Shared);
  const cudaError_t allowed = allow_shared<dispatch>(kShared);
  if (allowed != cudaSuccess) return allowed;
  // Warps wait for those of other ranks, so that all blocks must fit: one an SM.
  return launch_kernel(dispatch, num_sms, kThreads, kShared, stream, args);
}

}  // namespace deep_ep::cuda::internode
