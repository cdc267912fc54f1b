#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/internode/lane_rings.cuh"
#include "backend/cuda/internode/node_sums.cuh"
#include "backend/cuda/internode/stage.cuh"
#include "backend/cuda/internode/turns.cuh"
#include "backend/cuda/intranode/exchange.cuh"

namespace deep_ep::cuda::internode {

namespace {

// Warps of a block that sum this node's rows for other nodes, and those that add what has come
// home: of both kinds each block has some. The first wait for nobody; the second wait for the first
// ones of other ranks only (I20). One more tells peers what these have done.
constexpr int kThreads = (kRailWarps + 1) * 32;
// 16-byte loads of a lane that are under way at once: a row of 7168 BF16 values in four turns, or
// in seven, each of an item and of this node's rows.
constexpr int kSumUnroll = 7;
constexpr int kPairUnroll = 7;
constexpr int kAddUnroll = 4;

struct Shared {
  Stage::Storage stages[kRoleWarps];
  Sources sources[kRailWarps];
  Blocks blocks;
  RailShared rails;
};
static_assert(sizeof(Shared) <= kMaxSharedBytes);

// --- inside the node -----------------------------------------------------------------------------

/// By a warp: a part of a record's sum over `rows` listed rows, the first of which is in `first`
/// already, to `to`, which may be the same. Not inlined, so that the compiler keeps registers for
/// this loop, not for what is around it.
template <class T>
__device__ __noinline__ void sum_part(const Sources& sources, int rows, std::int64_t begin,
                                      int bytes, const std::byte* first, std::byte* to) {
  for_each_column<kSumUnroll>(bytes, [&](int at, auto steps) {
    Sum16<T> sums[steps.kCount];
    add_rows<T, steps.kCount, 1>(sums, &first, at);
#pragma unroll 1
    for (int row = 1; row < rows; ++row)
      add_rows<T, steps.kCount, 1>(sums, sources.rows + row, begin + at);
#pragma unroll
    for (int i = 0; i < steps.kCount; ++i)
      *reinterpret_cast<uint4*>(to + at + i * 512) = sums[i].round();
  });
}

/// By a warp: zeros, where a sum is not allowed.
__device__ void clear_part(int bytes, std::byte* to) {
  for (int at = lane_id() * 16; at < bytes; at += 512) *reinterpret_cast<uint4*>(to + at) = {};
}

/// By a warp: the next item of a ring, if there is room. A record that is not allowed goes as
/// zeros: its fault is known. A row alone need not be rounded on the way.
template <class T>
__device__ Turn send_sum(const CombineArgs& args, Shared& shared, Stage& stage, Teller& teller,
                         RingOut& end) {
  const Rails& rails = args.rails;
  const ItemShape& item = args.item;
  const MappedPeers& peers = shared.rails.peers;
  Turn turn;
  if (!may_put(rails, peers, item, teller, end, turn)) return turn;
  const std::int64_t record =
      plan::part_of(shared.blocks.records, end.node(rails)).begin + end.record;
  Sources& sources = shared.sources[threadIdx.x / 32];
  const int rows = list_rows(args, shared.blocks, record, rails.rank_of_peer(end.peer), sources);
  const std::int64_t begin = item.x_begin(end.piece);
  const auto bytes = static_cast<int>(item.x_size(end.piece));
  const OutItem out(rails, peers, item, end);
  // The stores of the item before are read meanwhile.
  compose_weights(args, sources, rows, out.to);
  if (rows > 0) {
    if (lane_id() == 0) fence_proxy_async_global();
    stage.load(sources.rows[0] + begin, bytes);
    stage.load_rest();
  }
  if (rows == 1 && out.direct) {
    stage.pass(
        [&](int share) {
          if (lane_id() == 0) stage.store(out.to + item.head_bytes, share);
        },
        [] {});
  } else {
    std::byte* here = rows > 0 ? stage.loaded() : stage.begin_sum(bytes);
    std::byte* sum = out.direct ? here : out.to + item.head_bytes;
    if (rows > 0) {
      sum_part<T>(sources, rows, begin, bytes, here, sum);
    } else {
      clear_part(bytes, sum);
    }
    if (out.direct) {
      stage.end_sum();
      stage.store_sum(out.to + item.head_bytes);
    }
  }
  if (out.direct) teller.tell_now<Stage::kShares>();  // of the item before
  send_out(rails, peers, item, out, teller, end, item.head_bytes + bytes);
  return turn;
}

/// By a summing warp: its rings.
template <class T>
__device__ void send_sums(const CombineArgs& args, Shared& shared) {
  const Rails& rails = args.rails;
  const Role role(static_cast<int>(threadIdx.x / 32));
  begin_rings<&RailState::Ring::out_begin, &RailState::Ring::sent>(rails, role);
  Stage stage(shared.stages[threadIdx.x / 32]);
  Teller teller(shared.rails.untold[threadIdx.x / 32]);
  (void)serve_rings<RingOut>(
      args.comm, rails, args.item, rails.state.lanes_in, role,
      [&](RingOut& end) { return send_sum<T>(args, shared, stage, teller, end); },
      [] { return false; }, [&](std::int64_t ring) { return missing_room(rails, ring); });
  teller.end();
  stage.finish();
}

// --- at the token's rank -------------------------------------------------------------------------

/// What a part of a token's sum is of: `addends` listed ones, items and then biases, and in place
/// `own_at` among them the sum of `rows` listed rows of this node, or -1.
struct Parts {
  int items;
  int addends;
  int own_at;
  int rows;
};

/// By a lane: the kSteps times 16 bytes that are `at` in a part, which begins at `begin` in the
/// row. The first item is loaded ahead of all sums, so that its bytes and those of this node's rows
/// are under way at once.
template <class T, int kSteps>
__device__ void add_columns(const Sources& sources, const Parts& parts, std::int64_t begin, int at,
                            std::byte* out) {
  uint4 bytes[kSteps];
  const auto load = [&](const std::byte* from) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      bytes[i] = *reinterpret_cast<const uint4*>(from + at + i * 512);
  };
  if (parts.addends > 0) load(sources.addends[0]);
  uint4 own[kSteps];
  if (parts.own_at >= 0) {
    Sum16<T> sums[kSteps];
    for (int row = 0; row < parts.rows; ++row)
      add_rows<T, kSteps, 1>(sums, sources.rows + row, begin + at);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) own[i] = sums[i].round();
  }
  Sum16<T> sums[kSteps];
  const auto add = [&](const uint4(&more)[kSteps]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) sums[i].add(more[i]);
  };
#pragma unroll 1
  for (int i = 0; i <= parts.addends; ++i) {
    if (i == parts.own_at) add(own);
    if (i == parts.addends) break;
    if (i > 0) load(sources.addends[i]);
    add(bytes);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) *reinterpret_cast<uint4*>(out + at + i * 512) = sums[i].round();
}

/// By a warp: a part that is of one row of this node, one item or both, which are under way
/// together. A row alone need not be rounded on the way.
template <class T>
__device__ __noinline__ void add_pair(const std::byte* row, const std::byte* item, int bytes,
                                      std::byte* out) {
  for_each_column<kPairUnroll>(bytes, [&](int at, auto steps) {
    uint4 parts[2][steps.kCount] = {};
#pragma unroll
    for (int i = 0; i < steps.kCount; ++i) {
      if (row != nullptr) parts[0][i] = *reinterpret_cast<const uint4*>(row + at + i * 512);
      if (item != nullptr) parts[1][i] = *reinterpret_cast<const uint4*>(item + at + i * 512);
    }
#pragma unroll
    for (int i = 0; i < steps.kCount; ++i) {
      Sum16<T> sum;
      sum.add(parts[0][i]);
      sum.add(parts[1][i]);
      *reinterpret_cast<uint4*>(out + at + i * 512) = sum.round();
    }
  });
}

/// By a warp: the `bytes` bytes of a part. Not inlined, as sum_part().
template <class T>
__device__ __noinline__ void add_part(const Sources& sources, Parts parts, std::int64_t begin,
                                      int bytes, std::byte* out) {
  if (parts.rows <= 1 && parts.addends <= 1) {
    add_pair<T>(parts.rows == 1 ? sources.rows[0] + begin : nullptr,
                parts.addends == 1 ? sources.addends[0] : nullptr, bytes, out);
    return;
  }
  for_each_column<kAddUnroll>(bytes, [&](int at, auto steps) {
    add_columns<T, steps.kCount>(sources, parts, begin, at, out);
  });
}

/// By a warp: a part of a token's sum.
template <class T>
__device__ void add_piece(const CombineArgs& args, const Sources& sources, const Parts& parts,
                          std::int64_t token, int piece) {
  const std::int64_t begin = args.item.x_begin(piece);
  add_part<T>(sources, parts, begin, static_cast<int>(args.item.x_size(piece)),
              args.combined_x + token * args.format.x_bytes + begin);
  if (piece > 0 || args.combined_topk_weights == nullptr) return;
  const int topk = args.comm.record.num_topk;
  for (int k = lane_id(); k < topk; k += 32) {
    float sum = 0.0f;
    for (int i = 0; i <= parts.items; ++i) {
      if (i == parts.own_at) sum = plan::add(sum, sum_weight(sources, parts.rows, k));
      if (i < parts.items) sum = plan::add(sum, sources.item_weights[i][k]);
    }
    args.combined_topk_weights[token * topk + k] = plan::from_float<float>(sum);
  }
}

/// By a warp: waits for the items of a piece and lists what is added; false if it left for a fault.
__device__ bool list_addends(const CombineArgs& args, const MappedPeers& peers,
                             const LaneRings& rings, std::int64_t token,
                             const TokenRecords& records, int piece, Sources& sources,
                             Parts& parts) {
  const Rails& rails = args.rails;
  const int nodes = rails.shape.topology.num_nodes();
  __syncwarp();  // the list before has been read
  parts.items = 0;
#pragma unroll 1
  for (int node = 0; node < nodes; ++node) {
    const bool goes = records.of(node) >= 0;
    if (node == rails.node) parts.own_at = goes ? parts.items : -1;
    if (node == rails.node || !goes) continue;
    const int peer = RailShape::peer_index(node, rails.node);
    const std::byte* item = wait_item(args, peers, rings, peer);
    if (item == nullptr) return false;
    if (lane_id() == 0) {
      sources.item_weights[parts.items] = reinterpret_cast<const float*>(item);
      sources.addends[parts.items] = item + args.item.head_bytes;
    }
    ++parts.items;
  }
  parts.addends = parts.items;
  for (const std::byte* bias : args.bias) {
    if (bias == nullptr) continue;
    if (lane_id() == 0)
      sources.addends[parts.addends] =
          bias + token * args.format.x_bytes + args.item.x_begin(piece);
    ++parts.addends;
  }
  __syncwarp();
  return true;
}

__device__ void release_items(const CombineArgs& args, const MappedPeers& peers, Teller& teller,
                              LaneRings& rings, const TokenRecords& records) {
  const int nodes = args.rails.shape.topology.num_nodes();
#pragma unroll 1
  for (int node = 0; node < nodes; ++node) {
    if (node == args.rails.node || records.of(node) < 0) continue;
    const int peer = RailShape::peer_index(node, args.rails.node);
    rings.advance(peer);
    release_item(args.rails, peers, teller, rings.lane(), peer, rings.consumed(peer));
  }
}

/// By a warp: a token of a lane; false if it cannot be summed.
template <class T>
__device__ bool add_token(const CombineArgs& args, Shared& shared, Teller& teller, LaneRings& rings,
                          std::int64_t token, const TokenRecords& records) {
  const Rails& rails = args.rails;
  const std::int32_t own = records.of(rails.node);
  Sources& sources = shared.sources[threadIdx.x / 32];
  Parts parts{};
  if (own >= 0) {
    const std::int64_t record = plan::part_of(shared.blocks.records, rails.node).begin + own;
    parts.rows = list_rows(args, shared.blocks, record, rails.rank(), sources);
    if (parts.rows < 0) return false;
  }
  for (int piece = 0; piece < args.item.pieces; ++piece) {
    if (!list_addends(args, shared.rails.peers, rings, token, records, piece, sources, parts))
      return false;
    add_piece<T>(args, sources, parts, token, piece);
    release_items(args, shared.rails.peers, teller, rings, records);
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

/// By an adding warp: the tokens of its lanes; `good` as long as nothing has failed.
template <class T>
__device__ void add_tokens(const CombineArgs& args, Shared& shared, bool good) {
  const Role role(static_cast<int>(threadIdx.x / 32) - kRoleWarps);
  const int lanes = args.rails.lanes;
  const std::int64_t tokens = args.comm.record.num_tokens;
  Teller teller(shared.rails.untold[threadIdx.x / 32]);
  for (int lane = role.number; lane < lanes; lane += role.count) {
    LaneRings rings(args.rails, lane);
    const std::int64_t begin = plan::channel_begin(tokens, lane, lanes);
    const std::int64_t end = plan::channel_begin(tokens, lane + 1, lanes);
    if (begin == end) continue;
    TokenRecords next(args, begin);
    for (std::int64_t token = begin; token < end; ++token) {
      const TokenRecords records = next;
      // On their way while this token is summed.
      next = TokenRecords(args, token + 1 < end ? token + 1 : token);
      good = good && add_token<T>(args, shared, teller, rings, token, records);
      if (!good) void_token(args, token);
    }
    rings.keep(args.rails);
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
  if (warp == kRailWarps) {
    tell_peers(shared.rails);
  } else if (warp >= kRoleWarps) {
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
