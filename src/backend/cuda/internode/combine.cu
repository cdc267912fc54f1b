#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/internode/node_sums.cuh"
#include "backend/cuda/internode/turns.cuh"
#include "backend/cuda/intranode/exchange.cuh"

namespace deep_ep::cuda::internode {

namespace {

// Warps of a block that sum this node's rows for other nodes, and those that add what has come
// home: of both kinds each block has some. The first wait for nobody; the second wait for the first
// ones of other ranks only (I20).
constexpr int kSumWarps = 6;
constexpr int kAddWarps = 6;
constexpr int kThreads = (kSumWarps + kAddWarps) * 32;
constexpr int kNodesALane = (plan::kMaxNodes + 31) / 32;

// --- inside the node -----------------------------------------------------------------------------

/// By a warp: the next item of a ring, if there is room. A record that is not allowed goes as
/// zeros: its fault is known.
template <class T>
__device__ Turn send_sum(const CombineArgs& args, const Blocks& sources, int lane, int peer) {
  const Rails& rails = args.rails;
  const ItemShape& item = args.item;
  const RingItems items(rails, item, rails.state.lanes_in, lane, peer);
  const std::int64_t number = rails.state.rings[items.ring].out_item;
  const std::uint64_t in_flight = items_in_flight(rails, items.ring);
  if (number == items.count) return in_flight == 0 ? Turn::kDone : Turn::kStuck;
  if (in_flight >= static_cast<std::uint64_t>(item.slots)) return Turn::kStuck;
  const auto piece = static_cast<int>(number % item.pieces);
  const std::int64_t record =
      plan::part_of(rails.state.records, items.node).begin + items.record + number / item.pieces;
  const Rows rows(args, record, rails.rank_of_peer(peer));
  compose_sum<T>(args, sources, rows, piece, out_slot(rails, item, items.ring));
  put_item(rails, item, lane, peer, item.head_bytes + item.x_size(piece));
  return Turn::kMoved;
}

/// By a summing warp: its rings.
template <class T>
__device__ void send_sums(const CombineArgs& args, const Blocks& sources) {
  const Rails& rails = args.rails;
  const Role role(0, kSumWarps);
  begin_rings<&RailState::Ring::out_item>(rails, role);
  (void)serve_rings(
      args.comm, rails, role,
      [&](int lane, int peer) { return send_sum<T>(args, sources, lane, peer); },
      [] { return false; }, [&](std::int64_t ring) { return missing_room(rails, ring); });
}

// --- at the token's rank -------------------------------------------------------------------------

/// Items of a token that have come home, at the lanes that look after their nodes
/// (node % 32 == lane).
struct Items {
  const std::byte* at[kNodesALane];

  /// Calls body(item) in all lanes, in ascending node, and own() in its place.
  template <class Body, class Own>
  __device__ void for_each(int nodes, int own_node, bool has_own, Body&& body, Own&& own) const {
#pragma unroll
    for (int i = 0; i < kNodesALane; ++i) {
      std::uint32_t left = __ballot_sync(0xffffffff, at[i] != nullptr);
      if (has_own && own_node / 32 == i) left |= 1u << own_node % 32;
      for (; left != 0; left &= left - 1) {
        const int lane = __ffs(static_cast<int>(left)) - 1;
        if (i * 32 + lane == own_node) {
          own();
          continue;
        }
        body(reinterpret_cast<const std::byte*>(
            __shfl_sync(0xffffffff, reinterpret_cast<std::uintptr_t>(at[i]), lane)));
      }
      if (nodes <= (i + 1) * 32) return;
    }
  }
};

/// By a lane: kSteps times 16 bytes of a token's sum; `at` in the row, `in_item` in the item's
/// part.
template <class T, int kSteps>
__device__ void add_columns(const CombineArgs& args, const Blocks& sources, const Items& items,
                            const Rows* own_rows, std::int64_t token, std::int64_t at,
                            std::int64_t in_item, bool inside) {
  Sum16<T> sums[kSteps];
  const auto add = [&](const std::byte* from) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (inside) sums[i].add(*reinterpret_cast<const uint4*>(from + i * 512));
  };
  items.for_each(
      args.rails.shape.topology.num_nodes(), args.rails.node, own_rows != nullptr,
      [&](const std::byte* item) { add(item + args.item.head_bytes + in_item); },
      [&] {
        uint4 own[kSteps];
        sum_columns<T, kSteps>(args, sources, *own_rows, at, inside, own);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) sums[i].add(own[i]);
      });
  const std::int64_t row = token * args.format.x_bytes + at;
  for (const std::byte* bias : args.bias)
    if (bias != nullptr) add(bias + row);
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    if (inside) *reinterpret_cast<uint4*>(args.combined_x + row + i * 512) = sums[i].round();
}

/// By a warp: a part of a token's sum.
template <class T>
__device__ void add_piece(const CombineArgs& args, const Blocks& sources, const Items& items,
                          const Rows* own_rows, std::int64_t token, int piece) {
  const std::int64_t begin = args.item.x_begin(piece);
  const std::int64_t bytes = args.item.x_size(piece);
  std::int64_t base = 0;
  for (; base + kUnroll * 512 <= bytes; base += kUnroll * 512) {
    const std::int64_t at = base + lane_id() * 16;
    add_columns<T, kUnroll>(args, sources, items, own_rows, token, begin + at, at, true);
  }
  for (; base < bytes; base += 512) {
    const std::int64_t at = base + lane_id() * 16;
    add_columns<T, 1>(args, sources, items, own_rows, token, begin + at, at, at < bytes);
  }
  if (piece > 0 || args.combined_topk_weights == nullptr) return;
  const int topk = args.comm.record.num_topk;
  for (int k0 = 0; k0 < topk; k0 += 32) {
    const int k = k0 + lane_id();
    float sum = 0.0f;
    items.for_each(
        args.rails.shape.topology.num_nodes(), args.rails.node, own_rows != nullptr,
        [&](const std::byte* item) {
          if (k < topk) sum = plan::add(sum, reinterpret_cast<const float*>(item)[k]);
        },
        [&] { sum = plan::add(sum, sum_weight(args, sources, *own_rows, k, k < topk)); });
    if (k < topk) args.combined_topk_weights[token * topk + k] = plan::from_float<float>(sum);
  }
}

/// By a warp: waits for the items of a piece of a token; false if it left for a fault.
__device__ bool wait_items(const CombineArgs& args, int lane, std::int64_t token, Items& items) {
  const Rails& rails = args.rails;
  const int nodes = rails.shape.topology.num_nodes();
#pragma unroll
  for (int i = 0; i < kNodesALane; ++i) items.at[i] = nullptr;
  for (int node = 0; node < nodes; ++node) {
    if (node == rails.node || args.send_rdma_head[token * nodes + node] < 0) continue;
    const int peer = RailShape::peer_index(node, rails.node);
    const std::byte* item = wait_item(args.comm, rails, args.item, lane, peer);
    if (item == nullptr) return false;
#pragma unroll
    for (int i = 0; i < kNodesALane; ++i)
      if (i * 32 + lane_id() == node) items.at[i] = item;
  }
  return true;
}

__device__ void release_items(const CombineArgs& args, int lane, std::int64_t token) {
  const int nodes = args.rails.shape.topology.num_nodes();
  for (int node = 0; node < nodes; ++node) {
    if (node == args.rails.node || args.send_rdma_head[token * nodes + node] < 0) continue;
    release_item(args.rails, lane, RailShape::peer_index(node, args.rails.node));
  }
}

/// By a warp: a token of a lane; false if it cannot be summed.
template <class T>
__device__ bool add_token(const CombineArgs& args, const Blocks& sources, int lane,
                          std::int64_t token) {
  const Rails& rails = args.rails;
  const int nodes = rails.shape.topology.num_nodes();
  const std::int32_t own = args.send_rdma_head[token * nodes + rails.node];
  const std::int64_t record = plan::part_of(rails.state.records, rails.node).begin + own;
  for (int piece = 0; piece < args.item.pieces; ++piece) {
    Items items;
    if (!wait_items(args, lane, token, items)) return false;
    if (own >= 0) {
      const Rows rows(args, record, rails.rank());
      if (!rows.good) return false;
      add_piece<T>(args, sources, items, &rows, token, piece);
    } else {
      add_piece<T>(args, sources, items, nullptr, token, piece);
    }
    release_items(args, lane, token);
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
__device__ void add_tokens(const CombineArgs& args, const Blocks& sources, bool good) {
  const Role role(kSumWarps, kAddWarps);
  const int lanes = args.rails.shape.num_lanes;
  const std::int64_t tokens = args.comm.record.num_tokens;
  for (std::int64_t lane = role.number; lane < lanes; lane += role.count) {
    const std::int64_t end = plan::channel_begin(tokens, static_cast<int>(lane) + 1, lanes);
    for (std::int64_t token = plan::channel_begin(tokens, static_cast<int>(lane), lanes);
         token < end; ++token) {
      good = good && add_token<T>(args, sources, static_cast<int>(lane), token);
      if (!good) void_token(args, token);
    }
  }
}

}  // namespace

// See notify.cu.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) combine(const __grid_constant__ CombineArgs args) {
  __shared__ Blocks sources;
  const Comm& comm = args.comm;
  const std::uint64_t epoch = comm.local->epoch + 1;
  const bool good = find_blocks(args, epoch, sources, [&](int rank, auto rows, auto room) {
    if (rank != comm.rank) return check_rows_fit(comm, comm.global_rank(rank), 0, rows, room);
    if (rows > room) raise_invalid(comm, Finding::kHandleRoom, 2, room, rows);
    return rows <= room;
  });
  if (threadIdx.x >= kSumWarps * 32) {
    add_tokens<T>(args, sources, good);
  } else if (good) {
    send_sums<T>(args, sources);
  }
  if (threadIdx.x % 32 == 0) nvshmem_quiet();
  if (!is_last_block(comm)) return;
  // "Landed" says here that all of the other's rows have been read.
  const bool complete =
      __syncthreads_and(good && may_start(comm)) != 0 && intranode::exchange_landed(comm, epoch);
  if (complete)
    flush_waits(comm, args.wait_stats == nullptr ? nullptr : args.wait_stats + comm.first_rank);
  tell_fault(comm, args.rails);
  end_kernel(comm);
}

template <class T>
cudaError_t launch(const CombineArgs& args, int num_sms, cudaStream_t stream) {
  combine<T><<<num_sms, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
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
