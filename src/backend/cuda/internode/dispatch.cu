#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/internode/arrival.cuh"
#include "backend/cuda/internode/outgoing.cuh"
#include "backend/cuda/intranode/exchange.cuh"

namespace deep_ep::cuda::internode {

namespace {

// Warps of a block that move rows: some write to rings, some read from them, some bring this rank's
// rows to its node. Each block has of all kinds, so that one block is enough, and none waits for
// another one. One more tells peers what these have done.
//
// Each kind has a loop of its own, since what a warp does for a part of a row is a chain: of few
// instructions, and of registers alone.
constexpr int kReadWarps = 3;
constexpr int kOwnWarps = 2;
constexpr int kPumpWarps = kSendWarps + kReadWarps + kOwnWarps;
constexpr int kThreads = (kPumpWarps + 1) * 32;

struct Shared {
  RailStage<RowPump> sending[kSendWarps];
  RailStage<PlacePump> placing[kPumpWarps - kSendWarps];
  Blocks targets;
  RailShared<kPumpWarps> rails;
  unsigned own_taken;  // of the block's parts of rows for this node
};
static_assert(sizeof(Shared) <= kMaxSharedBytes);

// --- passing on ----------------------------------------------------------------------------------

/// By a warp: all but x of a row goes to this node's ranks at once, x as `piece` and `note` say.
__device__ __forceinline__ void pass(const DispatchArgs& args, const Blocks& targets,
                                     const Arrival& row, Piece& piece, PlaceNote& note) {
  const Slots slots = place(args, targets, row);
#pragma unroll
  for (int i = 0; i < kRanksALane; ++i) note.to[i] = x_place(args, targets, slots, row.piece, i);
  piece = {row.x, static_cast<std::uint32_t>(args.item.x_size(row.piece))};
  note.bytes = piece.bytes;
}

__device__ __forceinline__ Flow flow_in(const Blocks& targets) {
  return {targets.records, true, targets.lanes};
}

/// By a warp that reads from rings: what it takes from there.
class Incoming {
 public:
  __device__ __forceinline__ Incoming(const DispatchArgs& args, const Shared& shared,
                                      const Role& role, const Team& team, ItemEnd* ends)
      : turns(args.rails, shared.rails.peers, args.item, flow_in(shared.targets), role, team),
        args_(args),
        peers_(shared.rails.peers),
        targets_(shared.targets),
        step_(team.size),
        ends_(ends) {}

  __device__ __forceinline__ bool operator()(Piece& piece, PlaceNote& note) {
    const Rails& rails = args_.rails;
    if (!turns.find([&](RingIn& end) { return look_in(rails, peers_, args_.item, step_, end); }))
      return false;
    const RingIn& end = turns.end;
    bool begun = false;
#pragma unroll 1
    while (true) {
      if (end.items == ahead_ && end.ring(rails) == ahead_ring_) {
        note.end = ends_.put(end);
        pass(args_, targets_, next_, piece, note);
        turns.advance();
        begun = true;
      }
      // The next one's, behind it; the load stands in one place, since it is long.
      if (!begun || (end.left > 0 && end.known > 0)) load();
      if (begun) return true;
    }
  }

  RingTurns<End::kIn> turns;

 private:
  /// Puts the head of the next item on its way, which is here.
  __device__ __forceinline__ void load() {
    const Rails& rails = args_.rails;
    const plan::RecordFormat& format = args_.record_format;
    const RingIn& end = turns.end;
    const std::byte* from = end.at;
    // What has been acquired comes before bulk copies, too.
    if (lane_id() == 0) fence_proxy_async_global();
    const auto& head = *reinterpret_cast<const plan::RecordHead*>(from);
    ahead_ = end.items;
    ahead_ring_ = static_cast<int>(end.ring(rails));
    next_.source = rails.rank_of_peer(end.peer);
    next_.meta.node = head.meta.node;
    next_.meta.token = head.meta.token;
    next_.record = head.record;
    next_.at = plan::part_of(targets_.records, end.node(rails)).begin + end.record;
    next_.positions =
        Positions(reinterpret_cast<const std::int32_t*>(from + sizeof head), args_.comm.num_ranks);
    next_.head = {Ids{from + format.topk_idx, args_.topk_idx.wide},
                  reinterpret_cast<const float*>(from + format.topk_weights),
                  reinterpret_cast<const std::uint32_t*>(from + format.scales), 1};
    next_.x = from + args_.item.head_bytes;
    next_.piece = end.piece;
    next_.load(args_);
  }

  const DispatchArgs& args_;
  const MappedPeers& peers_;
  const Blocks& targets_;
  int step_;
  ItemEnds<PlacePump> ends_;
  Arrival next_;
  std::uint64_t ahead_ = ~std::uint64_t{0};  // number of the item that next_ is
  int ahead_ring_ = -1;                      // in this ring
};

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

/// By a warp: this rank's rows for its node, part by part.
class OwnRows {
 public:
  __device__ OwnRows(const DispatchArgs& args, Shared& shared) : args_(args), shared_(shared) {}

  __device__ __forceinline__ bool operator()(Piece& piece, PlaceNote& note) {
    bool begun = false;
#pragma unroll 1
    while (true) {
      if (ahead_) pass(args_, shared_.targets, next_, piece, note);
      begun = begun || ahead_;
      take();
      if (begun || !ahead_) return begun;
    }
  }

 private:
  /// Puts the next part of the block on its way, if there is one.
  __device__ __forceinline__ void take() {
    ahead_ = false;
    if (ended_) return;
    const Rails& rails = args_.rails;
    const auto part = plan::part_of(shared_.targets.records, rails.node);
    const std::int64_t own = (part.end - part.begin) * args_.item.pieces;
    unsigned ticket = 0;
    if (lane_id() == 0) ticket = atomicAdd(&shared_.own_taken, 1U);
    ticket = __shfl_sync(0xffffffff, ticket, 0);
    const Role block = role_of(false, 0, 1);
    const std::int64_t number = std::int64_t{ticket} * block.count + block.number;
    ended_ = block.count == 0 || number >= own;
    if (ended_) return;
    ahead_ = true;
    next_.record = static_cast<std::int32_t>(number / args_.item.pieces);
    next_.piece = static_cast<int>(number % args_.item.pieces);
    next_.at = part.begin + next_.record;
    const std::int64_t token =
        args_.work.record_tokens[rails.node * args_.comm.record.num_tokens + next_.record];
    next_.source = rails.rank();
    next_.positions = Positions(positions_of(args_, token, rails.node), args_.comm.num_ranks);
    const float* weights = args_.topk_weights;
    next_.head = {ids_of(args_, token),
                  weights == nullptr ? nullptr : weights + token * args_.comm.record.num_topk,
                  args_.scales.data == nullptr
                      ? nullptr
                      : args_.scales.data + token * args_.scales.row_stride,
                  args_.scales.column_stride};
    next_.x = args_.x + token * args_.format.x_bytes + args_.item.x_begin(next_.piece);
    next_.load(args_);
    next_.meta.node = rails.node;
    next_.meta.token = static_cast<std::int32_t>(token);
  }

  const DispatchArgs& args_;
  Shared& shared_;
  Arrival next_;
  bool ahead_ = false;  // next_ is there
  bool ended_ = false;
};

/// Warps that read from one ring together.
__device__ int team_size(const DispatchArgs& args) {
  const auto blocks = static_cast<int>(gridDim.x);
  const int warps = (blocks - send_blocks(blocks)) * kReadWarps;
  if (args.item.pieces > 1) return 1;
  return max(1, min(warps / args.rails.shape.num_rings(), args.item.slots / 2));
}

/// By a warp that reads from rings: which of them, and with whom.
struct Reader {
  Role role;
  Team team;

  __device__ Reader(const DispatchArgs& args, int warp) : role(role_of(false, warp, kReadWarps)) {
    team.size = team_size(args);
    if (team.size == 1) return;
    const int rings = args.rails.shape.num_rings();
    if (role.count == 0) return;
    team.member = role.number / rings;
    // Those left over have none.
    role = {role.number % rings, team.member < team.size ? rings : 0};
  }
};

__device__ void send_rows(const DispatchArgs& args, Shared& shared, int warp) {
  RailStage<RowPump>& stage = shared.sending[warp];
  Outgoing rows(args, shared.rails.peers, role_of(true, warp, kSendWarps), stage.ends);
  send_items(args.comm, args.rails, args.item, stage, shared.rails.untold[warp], rows);
}

__device__ __forceinline__ void store_parts(const std::byte* from, const PlaceNote& note) {
#pragma unroll
  for (int i = 0; i < kRanksALane; ++i)
    if (note.to[i] != nullptr) bulk_store(note.to[i], from, note.bytes);
}

__device__ void pass_rows_on(const DispatchArgs& args, Shared& shared, int warp) {
  const Rails& rails = args.rails;
  RailStage<PlacePump>& stage = shared.placing[warp - kSendWarps];
  PlacePump pump(stage.pump);
  Teller teller(shared.rails.untold[warp]);
  const Reader reader(args, warp - kSendWarps);
  Incoming rows(args, shared, reader.role, reader.team, stage.ends);
  (void)pump_rings(
      args.comm, rails, pump, rows.turns, rows,
      [&](const std::byte* from, const PlaceNote& note) {
        store_parts(from, note);
        if (lane_id() == 0) release_item(rails, teller, stage.ends[note.end]);
      },
      [](const PlaceNote&) {},
      [&](std::int64_t ring) {
        const std::uint64_t consumed = rails.state.rings[ring].consumed;
        return Awaited{Wait::kRows, consumed + 1, consumed};
      });
  teller.end();
}

__device__ void place_own_rows(const DispatchArgs& args, Shared& shared, int warp) {
  PlacePump pump(shared.placing[warp - kSendWarps].pump);
  OwnRows rows(args, shared);
  pump.run_while(rows, store_parts);
  Teller(shared.rails.untold[warp]).end();
}

// --- this rank's results -------------------------------------------------------------------------

/// Rows behind the received ones, which no peer writes.
__device__ void fill_unused_rows(const DispatchArgs& args, const plan::RecvArrays& own,
                                 const Threads& threads) {
  const int all = args.rails.shape.topology.num_ranks;
  const std::int64_t received =
      args.rails.state.prefix[(std::int64_t{args.comm.rank} + 1) * all - 1];
  const std::int64_t step = std::int64_t{gridDim.x} * threads.count;
  const std::int64_t begin = std::int64_t{blockIdx.x} * threads.count + threads.index();
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

/// By the threads, true in each: notify has ended well, and all ranks of the node have their
/// blocks.
__device__ bool find_targets(const DispatchArgs& args, Blocks& targets, const Threads& threads) {
  const Comm& comm = args.comm;
  wait_for_kernel_before();
  const auto fits = [&](int rank, auto rows, auto room) {
    return check_rows_fit(comm, comm.global_rank(rank), 0, rows, room);
  };
  if (!find_blocks(args, comm.local->epoch + 1, targets, threads, fits)) return false;
  fill_unused_rows(args, targets.of[comm.rank], threads);
  return true;
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
  __syncthreads();
  const auto warp = static_cast<int>(threadIdx.x / 32);
  bool good = true;
  if (args.go == 0) {
    good = find_targets(args, targets, {0, kThreads});
  } else if (warp < kSendWarps) {
    good = wait_go(comm, args.rails, args.go);
  } else {
    // The warp that tells, too: see combine.cu.
    good = find_targets(args, targets, {kSendWarps * 32, kThreads - kSendWarps * 32});
  }
  if (warp == kPumpWarps) {
    shared.rails.tell();
  } else if (!good) {
    Teller(shared.rails.untold[warp]).end();
  } else if (warp < kSendWarps) {
    send_rows(args, shared, warp);
  } else if (warp < kSendWarps + kReadWarps) {
    pass_rows_on(args, shared, warp);
  } else {
    place_own_rows(args, shared, warp);
  }
  shared.rails.end(args, good);
  if (!is_last_block(comm, good)) return;
  const bool complete = good && all_landed(comm, comm.local->epoch + 1);
  if (complete) {
    if (team_size(args) > 1) count_consumed<kThreads>(args.rails, args.item, flow_in(targets));
    if (threadIdx.x == 32) {
      const Crossing rows(args.rails);
      count_rows(args.rails, args.item, rows.out, rows.in);
    }
    flush_waits(comm, args.wait_stats == nullptr ? nullptr : args.wait_stats + comm.first_rank);
  } else {
    void_block(comm, args, 0, 1);
    tell_fault(comm, args.rails);
  }
  if (threadIdx.x == 0) *args.rails.state.go = 0;
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
