#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/internode/additions.cuh"
#include "backend/cuda/internode/outgoing_sums.cuh"
#include "backend/cuda/intranode/exchange.cuh"

namespace deep_ep::cuda::internode {

namespace {

// Of the warps of a block some sum this node's rows for other nodes, the others add what has come
// home: each block has of both kinds. The first wait for nobody; the second wait for the first ones
// of other ranks only (I20). One more tells peers what these have done.
constexpr int kAddWarps = 9;
constexpr int kMoveWarps = kSendWarps + kAddWarps;
constexpr int kThreads = (kMoveWarps + 1) * 32;

struct Shared {
  RailStage<SumPump> stages[kSendWarps];
  Sources sources[kMoveWarps];
  HandleRows handle_rows[kSendWarps];
  Blocks blocks;
  RailShared<kMoveWarps> rails;
};
static_assert(sizeof(Shared) <= kMaxSharedBytes);

// --- inside the node -----------------------------------------------------------------------------

/// By a warp that writes to rings.
template <class T>
__device__ void send_sums(const CombineArgs& args, Shared& shared) {
  const auto warp = static_cast<int>(threadIdx.x / 32);
  RailStage<SumPump>& stage = shared.stages[warp];
  Sums<T> rows(args, shared.blocks, shared.handle_rows[warp], shared.rails.peers,
               role_of(true, warp, kSendWarps), shared.sources[warp], stage.ends);
  // What has been acquired comes before bulk copies, too.
  if (lane_id() == 0) fence_proxy_async_global();
  send_items(args.comm, args.rails, args.item, stage, shared.rails.untold[warp], rows);
}

// --- at the token's rank -------------------------------------------------------------------------

/// Where the sum of a token, or its part, comes by: the ring of a lane to a peer, of another node.
struct Sum {
  int node;
  int peer;
  int lane;
  int slot;
  std::uint64_t items;  // ahead of it, over all calls
};

/// By a warp that has nothing else to do: waits for an item. Null, and reported, if it does not
/// come.
__device__ const std::byte* wait_item(const CombineArgs& args, const MappedPeers& peers,
                                      const Sum& sum) {
  const Rails& rails = args.rails;
  const std::int64_t ring = rails.ring(sum.lane, sum.peer);
  std::uint64_t* word = rails.block.filled + ring * RailShape::kMostSlots + sum.slot;
  bool here = false;
  if (lane_id() == 0)
    here = peers.reached_from(sum.peer, word, sum.items + 1) ||
           wait_for_rail(args.comm, rails, peers, sum.peer, Wait::kRows, word, sum.items + 1);
  here = __shfl_sync(0xffffffff, here, 0);
  __syncwarp();  // what lane 0 acquired is visible to all
  return here ? rails.block.slots + ring * RailShape::kRingBytes + sum.slot * args.item.slot_bytes
              : nullptr;
}

/// By a warp: calls body(sum) for each other node that has a record of the token, in ascending
/// order, for its `piece`; stops, and returns false, if that is false.
template <class Body>
__device__ bool for_each_sum(const CombineArgs& args, const TokenRecords& records, int piece,
                             Body&& body) {
  const Rails& rails = args.rails;
  const int nodes = rails.shape.topology.num_nodes();
#pragma unroll 1
  for (int node = 0; node < nodes; ++node) {
    if (node == rails.node || records.of(node) < 0) continue;
    const std::uint64_t items = records.items(node) + piece;
    if (!body(Sum{node, RailShape::peer_index(node, rails.node), records.lane(node),
                  args.item.slot_of(items), items}))
      return false;
  }
  return true;
}

/// By a warp: waits for the items of a piece and lists what is added; false if it left for a fault.
__device__ bool list_addends(const CombineArgs& args, const MappedPeers& peers, std::int64_t token,
                             const TokenRecords& records, int piece, Sources& sources,
                             Addends& addends) {
  const Rails& rails = args.rails;
  __syncwarp();  // the list before has been read
  addends.items = 0;
  addends.own_at = -1;
  const bool own = records.of(rails.node) >= 0;
  const bool good = for_each_sum(args, records, piece, [&](const Sum& sum) {
    if (own && addends.own_at < 0 && sum.node > rails.node) addends.own_at = addends.items;
    const std::byte* item = wait_item(args, peers, sum);
    if (item == nullptr) return false;
    if (lane_id() == 0) {
      sources.item_weights[addends.items] = reinterpret_cast<const float*>(item);
      sources.addends[addends.items] = item + args.item.head_bytes;
    }
    ++addends.items;
    return true;
  });
  if (!good) return false;
  if (own && addends.own_at < 0) addends.own_at = addends.items;
  addends.addends = addends.items;
  for (const std::byte* bias : args.bias) {
    if (bias == nullptr) continue;
    if (lane_id() == 0)
      sources.addends[addends.addends] =
          bias + token * args.format.x_bytes + args.item.x_begin(piece);
    ++addends.addends;
  }
  __syncwarp();
  return true;
}

/// By a warp: a token; false if it cannot be summed. ahead() is called when all that is added is
/// known.
template <class T, class Ahead>
__device__ bool add_token(const CombineArgs& args, Shared& shared, Teller& teller,
                          std::int64_t token, const TokenRecords& records, const RecordHeads& heads,
                          Ahead&& ahead) {
  const Rails& rails = args.rails;
  const MappedPeers& peers = shared.rails.peers;
  Sources& sources = shared.sources[threadIdx.x / 32];
  Addends addends{};
  if (records.of(rails.node) >= 0) {
    addends.rows = list_rows(args, shared.blocks, heads, rails.rank(), sources);
    if (addends.rows < 0) return false;
  }
  for (int piece = 0; piece < args.item.pieces; ++piece) {
    if (!list_addends(args, peers, token, records, piece, sources, addends)) return false;
    if (piece == 0) ahead();
    add_piece<T>(args, sources, addends, token, piece);
    __syncwarp();
    (void)for_each_sum(args, records, piece, [&](const Sum& sum) {
      if (lane_id() != 0) return true;
      std::uint64_t* word = rails.block.credits +
                            ring_at_peer(rails, sum.lane, sum.peer) * RailShape::kMostSlots +
                            sum.slot;
      release_item(
          rails, teller,
          {peers.in_piece(sum.peer, word), sum.items + 1, sum.lane, sum.peer, sum.slot, 0});
      return true;
    });
  }
  return true;
}

/// By a warp, for a token that cannot be summed: NaN, so that nobody takes it for a result.
__device__ void void_token(const CombineArgs& args, std::int64_t token) {
  auto* row = reinterpret_cast<std::uint32_t*>(args.combined_x + token * args.format.x_bytes);
  for (std::int64_t i = lane_id(); i < args.format.x_bytes / 4; i += 32) row[i] = 0xffffffff;
  if (args.combined_topk_weights == nullptr) return;
  const int topk = args.comm.record.num_topk;
  for (int k = lane_id(); k < topk; k += 32)
    reinterpret_cast<std::uint32_t*>(args.combined_topk_weights)[token * topk + k] = 0xffffffff;
}

/// By an adding warp, unless `good`: nothing of the handle is looked at, which may be what is
/// wrong.
__device__ void void_tokens(const CombineArgs& args, Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const Role role = role_of(false, warp - kSendWarps, kAddWarps);
  const std::int64_t tokens = role.count > 0 ? args.comm.record.num_tokens : 0;
  for (std::int64_t token = role.number; token < tokens; token += role.count)
    void_token(args, token);
  Teller(shared.rails.untold[warp]).end();
}

/// By an adding warp. Warps take tokens in turns, in the order in which each ring brings their
/// sums: so whoever waits for the first token that is not yet added finds room made in all rings
/// that it comes by.
template <class T>
__device__ void add_tokens(const CombineArgs& args, Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x / 32) - kSendWarps;
  const Role role = role_of(false, warp, kAddWarps);
  Teller teller(shared.rails.untold[threadIdx.x / 32]);
  const std::int64_t own = plan::part_of(shared.blocks.records, args.rails.node).begin;
  const std::int64_t tokens = role.count > 0 ? args.comm.record.num_tokens : 0;
  std::int64_t next = role.number;
  bool good = true;
  if (next < tokens) {
    TokenRecords next_records(args, shared.blocks, next);
    RecordHeads next_heads;
    const auto load_heads = [&] {
      const std::int32_t record = next_records.of(args.rails.node);
      if (record >= 0) next_heads.load(args, own + record);
    };
    load_heads();
    while (next < tokens) {
      const std::int64_t token = next;
      const TokenRecords records = next_records;
      const RecordHeads heads = next_heads;
      next += role.count;
      // On their way while this token is summed.
      if (next < tokens) next_records = TokenRecords(args, shared.blocks, next);
      good = good && add_token<T>(args, shared, teller, token, records, heads, load_heads);
      if (!good) void_token(args, token);
    }
  }
  teller.end();
}

/// By the threads, true in each: notify has ended well, and all ranks of the node have their rows.
__device__ bool find_rows(const CombineArgs& args, Blocks& blocks, const Threads& threads) {
  const Comm& comm = args.comm;
  wait_for_kernel_before();
  const auto fits = [&](int rank, auto rows, auto room) {
    if (rank != comm.rank) return check_rows_fit(comm, comm.global_rank(rank), 0, rows, room);
    if (rows > room) raise_invalid(comm, Finding::kHandleRoom, 2, room, rows);
    return rows <= room;
  };
  return find_blocks(args, comm.local->epoch + 1, blocks, threads, fits);
}

}  // namespace

// See notify.cu.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) combine(const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Comm& comm = args.comm;
  if (threadIdx.x == 0) {
    find_own(args, shared.blocks);
    if (args.x != nullptr) {
      shared.blocks.of[comm.rank].x = const_cast<std::byte*>(args.x);
      shared.blocks.of[comm.rank].topk_weights =
          reinterpret_cast<std::byte*>(const_cast<float*>(args.topk_weights));
    }
  }
  shared.rails.begin(args.rails);
  __syncthreads();
  const auto warp = static_cast<int>(threadIdx.x / 32);
  bool good = true;
  if (args.go == 0) {
    good = find_rows(args, shared.blocks, {0, kThreads});
  } else if (warp < kSendWarps) {
    good = wait_go(comm, args.rails, args.go) && shared.handle_rows[warp].load(args);
  } else {
    // The warp that tells, too: what is sent until then is a few items a warp, which leaves the
    // link to notify. On 20 SMs more of them took 293 us instead of 288.
    good = find_rows(args, shared.blocks, {kSendWarps * 32, kThreads - kSendWarps * 32});
  }
  if (warp == kMoveWarps) {
    shared.rails.tell();
  } else if (warp >= kSendWarps) {
    if (good) {
      add_tokens<T>(args, shared);
    } else {
      void_tokens(args, shared);
    }
  } else if (good) {
    send_sums<T>(args, shared);
  } else {
    Teller(shared.rails.untold[warp]).end();
  }
  shared.rails.end(args, good);
  if (!is_last_block(comm, good)) return;
  // "Landed" says here that all of the other's rows have been read.
  const bool complete = good && all_landed(comm, comm.local->epoch + 1);
  if (complete) {
    const std::int32_t* sent = args.rails.state.totals + args.rails.shape.topology.num_ranks;
    count_consumed<kThreads>(args.rails, args.item, {sent, false, shared.blocks.lanes});
    if (threadIdx.x == 32) {
      const Crossing rows(args.rails);
      count_rows(args.rails, args.item, rows.in, rows.out);
    }
    flush_waits(comm, args.wait_stats == nullptr ? nullptr : args.wait_stats + comm.first_rank);
  } else {
    tell_fault(comm, args.rails);
  }
  if (threadIdx.x == 0) *args.rails.state.go = 0;
  end_kernel(comm, complete);
}

template <class T>
cudaError_t launch(const CombineArgs& args, int num_sms, cudaStream_t stream) {
  constexpr int kShared = sizeof(Shared);
  const cudaError_t allowed = allow_shared<combine<T>>(kShared);
  if (allowed != cudaSuccess) return allowed;
  return launch_kernel(combine<T>, num_sms, kThreads, kShared, stream, args);
}

cudaError_t load_combine() {
  return load<combine<__nv_bfloat162>, combine<__half2>, combine<float>>();
}

cudaError_t launch_combine(const CombineArgs& args, intranode::SumType type, int num_sms,
                           cudaStream_t stream) {
  // Warps wait for those of other ranks, so that all blocks must fit: one an SM.
  switch (type) {
    case intranode::SumType::kBfloat16:
      return launch<__nv_bfloat162>(args, num_sms, stream);
    case intranode::SumType::kFloat16:
      return launch<__half2>(args, num_sms, stream);
    default:
      return launch<float>(args, num_sms, stream);
  }
}

}  // namespace deep_ep::cuda::internode
