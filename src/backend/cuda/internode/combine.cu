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
  Sums<T> rows(args, shared.blocks, shared.rails.peers, role_of(true, warp, kSendWarps),
               shared.sources[warp], stage.ends);
  // What has been acquired comes before bulk copies, too.
  if (lane_id() == 0) fence_proxy_async_global();
  send_items(args.comm, args.rails, args.item, stage, shared.rails.untold[warp], rows);
}

// --- at the token's rank -------------------------------------------------------------------------

/// By a warp that has nothing else to do: waits for an item. Null, and reported, if it does not
/// come.
__device__ const std::byte* wait_item(const CombineArgs& args, const MappedPeers& peers, int lane,
                                      int peer, std::uint64_t items, int slot) {
  const Rails& rails = args.rails;
  const std::int64_t ring = rails.ring(lane, peer);
  std::uint64_t* word = rails.block.filled + ring * RailShape::kMostSlots + slot;
  bool here = false;
  if (lane_id() == 0)
    here = peers.reached_from(peer, word, items + 1) ||
           wait_for_rail(args.comm, rails, peers, peer, Wait::kRows, word, items + 1);
  here = __shfl_sync(0xffffffff, here, 0);
  __syncwarp();  // what lane 0 acquired is visible to all
  return here ? rails.block.slots + ring * RailShape::kRingBytes + slot * args.item.slot_bytes
              : nullptr;
}

/// A token of this rank, and the share of them that it is of.
struct LaneToken {
  std::int64_t token;
  int lane;
};

/// By a warp: calls body(peer, node, items, slot) for each other node that has a record of the
/// token, in ascending order, for its `piece`; stops, and returns false, if that is false.
template <class Body>
__device__ bool for_each_item(const CombineArgs& args, const TokenRecords& records, int piece,
                              Body&& body) {
  const Rails& rails = args.rails;
  const int nodes = rails.shape.topology.num_nodes();
#pragma unroll 1
  for (int node = 0; node < nodes; ++node) {
    if (node == rails.node || records.of(node) < 0) continue;
    const std::uint64_t items = records.items(node) + piece;
    if (!body(RailShape::peer_index(node, rails.node), node, items, args.item.slot_of(items)))
      return false;
  }
  return true;
}

/// By a warp: waits for the items of a piece and lists what is added; false if it left for a fault.
__device__ bool list_addends(const CombineArgs& args, const MappedPeers& peers, const LaneToken& at,
                             const TokenRecords& records, int piece, Sources& sources,
                             Addends& addends) {
  const Rails& rails = args.rails;
  __syncwarp();  // the list before has been read
  addends.items = 0;
  addends.own_at = -1;
  const bool own = records.of(rails.node) >= 0;
  const bool good =
      for_each_item(args, records, piece, [&](int peer, int node, std::uint64_t items, int slot) {
        if (own && addends.own_at < 0 && node > rails.node) addends.own_at = addends.items;
        const std::byte* item = wait_item(args, peers, at.lane, peer, items, slot);
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
          bias + at.token * args.format.x_bytes + args.item.x_begin(piece);
    ++addends.addends;
  }
  __syncwarp();
  return true;
}

/// By a warp: a token; false if it cannot be summed. ahead() is called when all that is added is
/// known.
template <class T, class Ahead>
__device__ bool add_token(const CombineArgs& args, Shared& shared, Teller& teller,
                          const LaneToken& at, const TokenRecords& records,
                          const RecordHeads& heads, Ahead&& ahead) {
  const Rails& rails = args.rails;
  const MappedPeers& peers = shared.rails.peers;
  Sources& sources = shared.sources[threadIdx.x / 32];
  Addends addends{};
  if (records.of(rails.node) >= 0) {
    addends.rows = list_rows(args, shared.blocks, heads, rails.rank(), sources);
    if (addends.rows < 0) return false;
  }
  for (int piece = 0; piece < args.item.pieces; ++piece) {
    if (!list_addends(args, peers, at, records, piece, sources, addends)) return false;
    if (piece == 0) ahead();
    add_piece<T>(args, sources, addends, at.token, piece);
    __syncwarp();
    (void)for_each_item(args, records, piece, [&](int peer, int, std::uint64_t items, int slot) {
      if (lane_id() != 0) return true;
      std::uint64_t* word =
          rails.block.credits + ring_at_peer(rails, at.lane, peer) * RailShape::kMostSlots + slot;
      release_item(rails, teller, {peers.in_piece(peer, word), items + 1, at.lane, peer, slot, 0});
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

/// The tokens of this rank, all lanes side by side: so what comes first by each ring is added
/// first, and whoever waits for a token has added all that its rings need room for.
class LaneTokens {
 public:
  /// Those of a warp.
  __device__ LaneTokens(const CombineArgs& args, const Role& role)
      : lanes_(static_cast<unsigned>(args.rails.lanes)),
        each_(static_cast<unsigned>(args.comm.record.num_tokens / lanes_)),
        rest_(static_cast<unsigned>(args.comm.record.num_tokens % lanes_)),
        at_(static_cast<unsigned>(role.number)),
        stride_(static_cast<unsigned>(role.count)) {}

  /// The next one; token = -1: there is none.
  __device__ LaneToken next() {
    while (true) {
      const unsigned row = at_ / lanes_;
      const unsigned lane = at_ % lanes_;
      if (row > each_ || stride_ == 0) return {-1, 0};
      at_ += stride_;
      const std::int64_t token = begin(lane) + row;
      if (token < begin(lane + 1)) return {token, static_cast<int>(lane)};
    }
  }

 private:
  /// plan::channel_begin(), its long divisions done once.
  __device__ std::int64_t begin(unsigned lane) const {
    return std::int64_t{each_} * lane + rest_ * lane / lanes_;
  }

  unsigned lanes_;
  unsigned each_;
  unsigned rest_;
  unsigned at_;
  unsigned stride_;
};

/// By an adding warp; `good` as long as nothing has failed.
template <class T>
__device__ void add_tokens(const CombineArgs& args, Shared& shared, bool good) {
  const int warp = static_cast<int>(threadIdx.x / 32) - kSendWarps;
  const Role role = role_of(false, warp, kAddWarps);
  LaneTokens tokens(args, role);
  Teller teller(shared.rails.untold[threadIdx.x / 32]);
  const std::int64_t own = plan::part_of(shared.blocks.records, args.rails.node).begin;
  LaneToken next = tokens.next();
  if (next.token >= 0) {
    TokenRecords next_records(args, next.token, next.lane);
    RecordHeads next_heads;
    const auto load_heads = [&] {
      const std::int32_t record = next_records.of(args.rails.node);
      if (record >= 0) next_heads.load(args, own + record);
    };
    load_heads();
    while (next.token >= 0) {
      const LaneToken at = next;
      const TokenRecords records = next_records;
      const RecordHeads heads = next_heads;
      next = tokens.next();
      // On their way while this token is summed.
      if (next.token >= 0) next_records = TokenRecords(args, next.token, next.lane);
      good = good && add_token<T>(args, shared, teller, at, records, heads, load_heads);
      if (!good) void_token(args, at.token);
    }
  }
  teller.end();
}

}  // namespace

// See notify.cu.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) combine(const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Comm& comm = args.comm;
  if (threadIdx.x == 0) find_own(args, shared.blocks);
  shared.rails.begin(args.rails);
  wait_for_kernel_before();
  const std::uint64_t epoch = comm.local->epoch + 1;
  const bool good = find_blocks(args, epoch, shared.blocks, [&](int rank, auto rows, auto room) {
    if (rank != comm.rank) return check_rows_fit(comm, comm.global_rank(rank), 0, rows, room);
    if (rows > room) raise_invalid(comm, Finding::kHandleRoom, 2, room, rows);
    return rows <= room;
  });
  if (threadIdx.x == 0 && args.x != nullptr) {
    shared.blocks.of[comm.rank].x = const_cast<std::byte*>(args.x);
    shared.blocks.of[comm.rank].topk_weights =
        reinterpret_cast<std::byte*>(const_cast<float*>(args.topk_weights));
  }
  __syncthreads();
  const auto warp = static_cast<int>(threadIdx.x / 32);
  if (warp == kMoveWarps) {
    shared.rails.tell();
  } else if (warp >= kSendWarps) {
    add_tokens<T>(args, shared, good);
  } else if (good) {
    send_sums<T>(args, shared);
  } else {
    Teller(shared.rails.untold[warp]).end();
  }
  if (threadIdx.x % 32 == 0) shared.rails.peers.quiet(args.rails);
  if (!is_last_block(comm)) return;
  // "Landed" says here that all of the other's rows have been read.
  const bool complete = good && all_landed(comm, epoch);
  if (complete) {
    count_consumed<kThreads>(args.rails, args.item, args.rails.state.lanes_out);
    if (threadIdx.x == 32) {
      const Crossing rows(args.rails);
      count_rows(args.rails, args.item, rows.in, rows.out);
    }
    flush_waits(comm, args.wait_stats == nullptr ? nullptr : args.wait_stats + comm.first_rank);
  } else {
    tell_fault(comm, args.rails);
  }
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
