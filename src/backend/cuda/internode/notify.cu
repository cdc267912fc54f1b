#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/routing.cuh"
#include "backend/cuda/internode/counts.cuh"
#include "backend/cuda/internode/rail.cuh"
#include "backend/cuda/intranode/exchange.cuh"

namespace deep_ep::cuda::internode {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxLocalExperts = protocol::ControlBlock::kMaxLocalExperts;
static_assert(kThreads >= plan::kMaxNodes && kThreads >= plan::kMaxRanksPerNode);

// --- positions: which of the rows for a rank, and of the records for a node, each token is ------

/// By a warp: the rows of one part for `rank`.
__device__ void place_rows(const NotifyArgs& args, const PartTable& table, std::int64_t number,
                           int rank, std::uint64_t epoch) {
  const int ranks = args.rails.shape.topology.num_ranks;
  const RoutingArrays& routing = args.routing;
  const Part part = place_part(
      table, number, rank, epoch,
      [&](std::int64_t token) { return routing.is_token_in_rank[token * ranks + rank]; },
      [&](std::int64_t token, std::int32_t position) {
        args.work.send_head[token * ranks + rank] = position;
      });
  const std::int64_t end = (std::int64_t{rank} + 1) * routing.num_channels;
  if (!args.cached && routing.gbl_channel_prefix_matrix != nullptr) {
    write_prefix(part, table.tokens, routing.num_channels,
                 routing.gbl_channel_prefix_matrix + end - routing.num_channels);
  }
  if (part.end != table.tokens || threadIdx.x % 32 != 0) return;
  const std::int32_t rows = part.rows_until(part.end);
  args.rails.state.totals[rank] = rows;
  if (args.cached) {
    const std::int32_t told = routing.gbl_channel_prefix_matrix[end - 1];
    if (rows != told) raise_invalid(args.comm, Finding::kHandleCounts, rank, told, rows);
  } else if (args.num_tokens_per_rank != nullptr && rows != args.num_tokens_per_rank[rank]) {
    raise_invalid(args.comm, Finding::kCounts, rank, args.num_tokens_per_rank[rank], rows);
  }
}

/// By a warp: the records of one part for `node`.
__device__ void place_records(const NotifyArgs& args, const PartTable& table, std::int64_t number,
                              int node, std::uint64_t epoch) {
  const plan::Topology& topology = args.rails.shape.topology;
  const int nodes = topology.num_nodes();
  const RoutingArrays& routing = args.routing;
  const Part part = place_part(
      table, number, topology.num_ranks + node, epoch,
      [&](std::int64_t token) {
        const bool* row =
            routing.is_token_in_rank + token * topology.num_ranks + topology.rank_of(node, 0);
        bool goes = false;
        for (int i = 0; i < topology.ranks_per_node; ++i) goes = goes || row[i];
        return goes;
      },
      [&](std::int64_t token, std::int32_t record) {
        std::int32_t* head = routing.send_rdma_head + token * nodes + node;
        // A handle's are not written here: so they may be loaded ahead of what is.
        const std::int32_t told = args.cached ? __ldg(head) : record;
        if (told != record)
          raise_invalid(args.comm, Finding::kBadRecord, token, node, told, record);
        if (!args.cached) *head = record;
        if (record >= 0)
          args.work.record_tokens[node * table.tokens + record] = static_cast<std::int32_t>(token);
      });
  if (!args.cached && routing.rdma_channel_prefix_matrix != nullptr) {
    write_prefix(part, table.tokens, routing.num_channels,
                 routing.rdma_channel_prefix_matrix + std::int64_t{node} * routing.num_channels);
  }
  if (part.end == table.tokens && lane_id() == 0)
    args.rails.state.totals[topology.num_ranks + node] = part.rows_until(part.end);
}

/// By all warps of the grid, in turn: part by part, so that no warp waits for a later turn.
__device__ void place_tokens(const NotifyArgs& args, std::uint64_t epoch) {
  const plan::Topology& topology = args.rails.shape.topology;
  const int columns = topology.num_ranks + topology.num_nodes();
  const PartTable table{args.counts, columns, args.comm.record.num_tokens};
  const std::int64_t units = table.parts() * columns;
  for (std::int64_t unit = blockIdx.x * kWarps + threadIdx.x / 32; unit < units;
       unit += std::int64_t{gridDim.x} * kWarps) {
    const int column = static_cast<int>(unit % columns);
    if (column < topology.num_ranks) {
      place_rows(args, table, unit / columns, column, epoch);
    } else {
      place_records(args, table, unit / columns, column - topology.num_ranks, epoch);
    }
  }
}

// --- between nodes, by the last block -----------------------------------------------------------

/// Local experts of a node, whose counts are announced.
__device__ int announced_experts(const NotifyArgs& args) {
  return args.num_tokens_per_expert == nullptr
             ? 0
             : args.comm.record.num_experts / args.rails.shape.topology.num_nodes();
}
__device__ std::size_t announced_bytes(const NotifyArgs& args) {
  return sizeof(Announcement) + 4 * static_cast<std::size_t>(announced_experts(args));
}

/// The mailbox of two announcements ago is read by nobody any more, nor is what was put from here
/// (I17): our rail peers have announced the one before, so they had ended the one before that.
/// Where a peer's memory is mapped the message is written there.
__device__ void post_rails(const NotifyArgs& args, const MappedPeers& peers, std::uint64_t number) {
  const Rails& rails = args.rails;
  const plan::Topology& topology = rails.shape.topology;
  const RailBlock::Mailbox& mailbox = rails.block.mailbox[number % 2];
  const int experts = announced_experts(args);
  for (int peer = 0; peer < rails.shape.num_peers(); ++peer) {
    const int node = RailShape::node_of_peer(peer, rails.node);
    const std::int64_t slot = RailShape::peer_index(rails.node, node);
    std::byte* out = peers.maps(peer)
                         ? peers.in_piece(peer, mailbox.messages + slot * rails.block.message_bytes)
                         : mailbox.out_messages + peer * rails.block.message_bytes;
    auto& message = *reinterpret_cast<Announcement*>(out);
    if (threadIdx.x == 0) {
      message.record = args.comm.record;
      message.num_experts = experts;
      message.lanes = rails.lanes;
      message.records = rails.state.totals[topology.num_ranks + node];
    }
    for (int i = threadIdx.x; i < topology.ranks_per_node; i += kThreads)
      message.rows[i] = rails.state.totals[topology.rank_of(node, i)];
    auto* counts = reinterpret_cast<std::int32_t*>(out + sizeof message);
    for (int i = threadIdx.x; i < experts; i += kThreads)
      counts[i] = args.num_tokens_per_expert[std::int64_t{node} * experts + i];
    if (!peers.maps(peer)) fence_acq_rel_sys();
  }
  __syncthreads();
  for (int peer = 0; peer < rails.shape.num_peers(); ++peer) {
    const std::int64_t slot =
        RailShape::peer_index(rails.node, RailShape::node_of_peer(peer, rails.node));
    if (peers.maps(peer)) {
      // release: what all threads wrote comes before the barrier; pairs with the acquire in
      // reached_from().
      if (threadIdx.x == peer % kThreads)
        protocol::store_release(peers.in_piece(peer, mailbox.posted + slot), number);
      continue;
    }
    nvshmemx_putmem_signal_nbi_block(mailbox.messages + slot * rails.block.message_bytes,
                                     mailbox.out_messages + peer * rails.block.message_bytes,
                                     announced_bytes(args), mailbox.posted + slot, number,
                                     NVSHMEM_SIGNAL_SET, rails.rank_of_peer(peer));
  }
}

/// By all threads, true in each: every rail peer has announced the same call.
__device__ bool wait_rails(const NotifyArgs& args, const MappedPeers& peers, std::uint64_t number) {
  const Rails& rails = args.rails;
  bool good = true;
  const auto peer = static_cast<int>(threadIdx.x);
  if (peer < rails.shape.num_peers()) {
    const int rank = rails.rank_of_peer(peer);
    const long long begin = args.wait_stats == nullptr ? 0 : clock64();
    const auto& theirs = message_of(rails, number, RailShape::node_of_peer(peer, rails.node));
    std::uint64_t* posted = rails.block.mailbox[number % 2].posted + peer;
    good = wait_for_rail(args.comm, rails, peers, peer, Wait::kCall, posted, number) &&
           agrees(args.comm, args.comm.record, theirs.record, rank);
    if (args.wait_stats != nullptr) args.wait_stats[rank] += clock64() - begin;
  }
  return __syncthreads_and(good) != 0;
}

// --- inside the node ----------------------------------------------------------------------------

/// Of each source of this rank's index: rows for each rank of the node, then its tokens. And the
/// entries of all of them for each local expert.
__device__ void tell_node(const NotifyArgs& args, std::uint64_t epoch, std::uint64_t number) {
  const Comm& comm = args.comm;
  const Rails& rails = args.rails;
  const plan::Topology& topology = rails.shape.topology;
  const int nodes = topology.num_nodes();
  const int width = comm.num_ranks + 1;
  const int local_experts = comm.record.num_experts / topology.num_ranks;
  for (int to = 0; to < comm.num_ranks; ++to) {
    const protocol::Mailbox mailbox = comm.control(to).block.mailbox_of(epoch);
    std::int32_t* counts = mailbox.tokens_per_rank + std::int64_t{comm.rank} * nodes * width;
    for (int i = threadIdx.x; i < nodes * width; i += kThreads) {
      const int node = i / width;
      const int rank = i % width;
      const bool here = node == rails.node;
      if (rank < comm.num_ranks) {
        counts[i] = here ? rails.state.totals[topology.rank_of(node, rank)]
                         : message_of(rails, number, node).rows[rank];
      } else {
        counts[i] = static_cast<std::int32_t>(
            here ? comm.record.num_tokens : message_of(rails, number, node).record.num_tokens);
      }
    }
    if (args.num_tokens_per_expert == nullptr) continue;
    std::int32_t* experts = mailbox.tokens_per_expert + std::int64_t{comm.rank} * kMaxLocalExperts;
    for (int e = threadIdx.x; e < local_experts; e += kThreads) {
      std::int32_t sum =
          args.num_tokens_per_expert[std::int64_t{comm.global_rank(to)} * local_experts + e];
      for (int node = 0; node < nodes; ++node) {
        if (node == rails.node) continue;
        const Announcement& message = message_of(rails, number, node);
        sum += reinterpret_cast<const std::int32_t*>(&message + 1)[to * local_experts + e];
      }
      experts[e] = sum;
    }
  }
}

/// What the host waits for: counts, then the ticket.
__device__ void tell_host(const NotifyArgs& args, const protocol::Mailbox& mailbox) {
  if (args.ticket == 0) return;
  const Comm& comm = args.comm;
  const plan::Topology& topology = args.rails.shape.topology;
  HostStatus& status = *comm.status;
  const int local_experts = comm.record.num_experts / topology.num_ranks;
  for (int e = threadIdx.x; args.num_tokens_per_expert != nullptr && e < local_experts;
       e += kThreads) {
    std::int64_t sum = 0;
    for (int from = 0; from < comm.num_ranks; ++from)
      sum += mailbox.tokens_per_expert[std::int64_t{from} * kMaxLocalExperts + e];
    status.tokens_per_expert[e] = sum;
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;
  const RailState& state = args.rails.state;
  status.num_recv_rows = state.prefix[(comm.rank + 1) * topology.num_ranks - 1];
  status.num_recv_records = state.records[topology.num_nodes() - 1];
  // release: pairs with the host's acquire in await_ticket().
  protocol::store_release(&status.ticket, args.ticket);
}

/// By the last block, true in each thread: every rank has announced this call, and nobody has a
/// fault.
__device__ bool exchange_counts(const NotifyArgs& args, const MappedPeers& peers,
                                std::uint64_t epoch) {
  const Comm& comm = args.comm;
  const std::uint64_t number = *args.rails.state.announced + 1;
  post_rails(args, peers, number);
  if (!wait_rails(args, peers, number)) return false;
  // Of one that has its node for itself the host alone asks for what it would be told.
  if (comm.num_ranks > 1 || args.num_tokens_per_expert != nullptr) tell_node(args, epoch, number);
  if (comm.num_ranks > 1) {
    __syncthreads();
    intranode::post(comm, epoch);
    if (!intranode::wait_posted(comm, epoch, args.wait_stats)) return false;
  }
  read_counts(args, Told(args, epoch, number), number);
  // Counts that are a fault are not told: the host finds the kernel ended without them.
  const bool good = __syncthreads_and(may_start(comm)) != 0;
  if (good) tell_host(args, comm.control(comm.rank).block.mailbox_of(epoch));
  if (threadIdx.x == 0) {
    peers.quiet(args.rails);
    *args.rails.state.announced = number;
    const std::uint64_t posted = args.rails.shape.num_peers();
    count_puts(args.rails, posted, posted * announced_bytes(args), posted);
  }
  return good;
}

/// By one block: without counts no row is anywhere.
__device__ void void_counts(const NotifyArgs& args) {
  if (args.cached || args.routing.recv_gbl_rank_prefix_sum == nullptr) return;
  const plan::Topology& topology = args.rails.shape.topology;
  const auto fill = [](std::int32_t* to, std::int64_t count, std::int32_t value) {
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = value;
  };
  const RoutingArrays& routing = args.routing;
  const int nodes = topology.num_nodes();
  fill(routing.recv_gbl_rank_prefix_sum, topology.num_ranks, 0);
  fill(routing.recv_rdma_rank_prefix_sum, nodes, 0);
  fill(routing.gbl_channel_prefix_matrix, topology.num_ranks * routing.num_channels, 0);
  fill(routing.rdma_channel_prefix_matrix, nodes * routing.num_channels, 0);
  fill(routing.send_rdma_head, args.comm.record.num_tokens * nodes, -1);
}

}  // namespace

// Not in the unnamed namespace: device code is linked, and names of kernels would have the file's
// in them.
__global__ void __launch_bounds__(kThreads) notify(const __grid_constant__ NotifyArgs args) {
  __shared__ MappedPeers peers;
  wait_for_kernel_before();
  // Behind the wait: the kernel behind may read what those before have written.
  allow_kernel_behind();
  const Comm& comm = args.comm;
  const std::uint64_t epoch = comm.local->epoch + 1;
  if (args.go_at_once && blockIdx.x == 0 && threadIdx.x == 0 && may_start(comm))
    let_go(args.rails, args.go);
  peers.find(args.rails);
  // Tokens are placed whatever has failed: warps of several blocks wait for each other's counts,
  // and each block would see a fault at another time.
  place_tokens(args, epoch);
  check_ids(comm, args.topk_idx, args.routing.is_token_in_rank, args.rails.shape.topology.num_ranks,
            static_cast<int>(gridDim.x));
  if (!is_last_block(comm)) return;
  bool good = __syncthreads_and(may_start(comm)) != 0;
  if (good && !args.go_at_once && threadIdx.x == 0) let_go(args.rails, args.go);
  good = good && exchange_counts(args, peers, epoch);
  if (!good) {
    void_counts(args);
    tell_fault(comm, args.rails);
  }
  end_kernel(comm, good);
}

cudaError_t load_notify() { return load<notify>(); }

cudaError_t launch_notify(const NotifyArgs& args, int num_sms, cudaStream_t stream) {
  // A few ids for each thread.
  constexpr std::int64_t kIdsABlock = 4 * kThreads;
  const plan::Topology& topology = args.rails.shape.topology;
  const protocol::CallRecord& record = args.comm.record;
  const std::int64_t parts = (record.num_tokens + kTokensPerCount - 1) / kTokensPerCount;
  const std::int64_t for_parts =
      (parts * (topology.num_ranks + topology.num_nodes()) + kWarps - 1) / kWarps;
  const std::int64_t for_ids =
      args.topk_idx.data == nullptr
          ? 0
          : (record.num_tokens * record.num_topk + kIdsABlock - 1) / kIdsABlock;
  const std::int64_t most = for_parts > for_ids ? for_parts : for_ids;
  const std::int64_t wanted = most < 1 ? 1 : most;
  return launch_kernel(notify, wanted < num_sms ? wanted : num_sms, kThreads, 0, stream, args);
}

}  // namespace deep_ep::cuda::internode
