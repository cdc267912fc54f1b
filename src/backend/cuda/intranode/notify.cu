#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/routing.cuh"
#include "backend/cuda/intranode/exchange.cuh"
#include "backend/cuda/intranode/steps.hpp"

namespace deep_ep::cuda::intranode {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxLocalExperts = protocol::ControlBlock::kMaxLocalExperts;

/// By all warps of the grid, in turn: part by part, so that no warp waits for a later turn.
__device__ void place_tokens(const NotifyArgs& args, std::uint64_t epoch, int blocks) {
  const int ranks = args.comm.num_ranks;
  const PartTable table{args.counts, ranks, args.comm.record.num_tokens};
  const std::int64_t units = table.parts() * ranks;
  for (std::int64_t unit = blockIdx.x * kWarps + threadIdx.x / 32; unit < units;
       unit += std::int64_t{blocks} * kWarps) {
    const int rank = static_cast<int>(unit % ranks);
    const Part part = place_part(
        table, unit / ranks, rank, epoch,
        [&](std::int64_t token) { return args.is_token_in_rank[token * ranks + rank]; },
        [&](std::int64_t token, std::int32_t position) {
          args.send_head[token * ranks + rank] = position;
        });
    write_prefix(part, table.tokens, args.num_channels,
                 args.channel_prefix_matrix + std::int64_t{rank} * args.num_channels);
    if (part.end != table.tokens || threadIdx.x % 32 != 0) continue;
    const std::int32_t rows = part.rows_until(part.end);
    if (rows != args.num_tokens_per_rank[rank])
      raise_invalid(args.comm, Finding::kCounts, rank, args.num_tokens_per_rank[rank], rows);
  }
}

// --- counts, by one block --------------------------------------------------------------

__device__ void write_counts(const NotifyArgs& args, std::uint64_t epoch) {
  const Comm& comm = args.comm;
  const int ranks = comm.num_ranks;
  const int local_experts = comm.record.num_experts / ranks;
  for (int i = 0; i < ranks; ++i) {
    const protocol::Mailbox mailbox = comm.control(i).block.mailbox_of(epoch);
    for (int j = threadIdx.x; j < ranks; j += kThreads) {
      mailbox.tokens_per_rank[comm.rank * ranks + j] = args.num_tokens_per_rank[j];
    }
    if (args.num_tokens_per_expert == nullptr) continue;
    for (int e = threadIdx.x; e < local_experts; e += kThreads) {
      mailbox.tokens_per_expert[comm.rank * kMaxLocalExperts + e] =
          args.num_tokens_per_expert[i * local_experts + e];
    }
  }
}

/// rank_prefix_matrix from the counts of all; a thread for each destination.
__device__ void read_counts(const NotifyArgs& args, const protocol::Mailbox& mailbox) {
  const int ranks = args.comm.num_ranks;
  for (int to = threadIdx.x; to < ranks; to += kThreads) {
    std::int64_t sum = 0;
    bool good = true;
    for (int from = 0; from < ranks; ++from) {
      const std::int32_t count = mailbox.tokens_per_rank[from * ranks + to];
      sum += count;
      good = good && count >= 0 && sum <= INT32_MAX;
      args.rank_prefix_matrix[from * ranks + to] = static_cast<std::int32_t>(sum);
    }
    if (!good) {
      raise_invalid(args.comm, Finding::kTooManyRows, to);
    } else if (to == args.comm.rank && args.max_rows != 0 && sum > args.max_rows) {
      raise(args.comm, Finding::kCapacity, kCapacityCode, args.comm.global_rank(to), sum,
            args.max_rows);
    }
  }
}

/// What the host waits for. The counts of the experts that this rank owns, then the ticket.
__device__ void tell_host(const NotifyArgs& args, const protocol::Mailbox& mailbox) {
  if (args.ticket == 0) return;
  const Comm& comm = args.comm;
  HostStatus& status = *comm.status;
  const int ranks = comm.num_ranks;
  const int local_experts = comm.record.num_experts / ranks;
  for (int e = threadIdx.x; e < local_experts; e += kThreads) {
    std::int64_t sum = 0;
    for (int from = 0; from < ranks; ++from) {
      sum += mailbox.tokens_per_expert[from * kMaxLocalExperts + e];
    }
    status.tokens_per_expert[e] = sum;
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;
  status.num_recv_rows = args.rank_prefix_matrix[(ranks - 1) * ranks + comm.rank];
  // release: pairs with the host's acquire in await_counts().
  protocol::store_release(&status.ticket, args.ticket);
}

__device__ void exchange_counts(const NotifyArgs& args, std::uint64_t epoch) {
  write_counts(args, epoch);
  __syncthreads();
  post(args.comm, epoch);
  if (!wait_posted(args.comm, epoch)) return;
  const protocol::Mailbox mailbox = args.comm.control(args.comm.rank).block.mailbox_of(epoch);
  read_counts(args, mailbox);
  // Counts that are a fault are not told: the host finds the kernel ended without them.
  if (__syncthreads_and(may_start(args.comm)) != 0) tell_host(args, mailbox);
}

/// By one block: without counts no row is anywhere.
__device__ void void_counts(const NotifyArgs& args) {
  const int ranks = args.comm.num_ranks;
  for (int i = threadIdx.x; i < ranks * ranks; i += kThreads) args.rank_prefix_matrix[i] = 0;
  for (int i = threadIdx.x; i < ranks * args.num_channels; i += kThreads)
    args.channel_prefix_matrix[i] = 0;
  const std::int64_t heads = args.comm.record.num_tokens * ranks;
  for (std::int64_t i = threadIdx.x; i < heads; i += kThreads) args.send_head[i] = -1;
}

__global__ void __launch_bounds__(kThreads) notify(const __grid_constant__ NotifyArgs args) {
  const Comm& comm = args.comm;
  wait_for_kernel_before();
  const std::uint64_t epoch = comm.local->epoch + 1;
  // The last block exchanges, if there are others to do the rest.
  const int blocks = gridDim.x == 1 ? 1 : static_cast<int>(gridDim.x) - 1;
  // Tokens are placed whatever has failed: warps of several blocks wait for each other's counts,
  // and each block would see a fault at another time.
  if (blockIdx.x < blocks) {
    place_tokens(args, epoch, blocks);
    check_ids(comm, args.topk_idx, args.is_token_in_rank, comm.num_ranks, blocks);
  }
  if (blockIdx.x + 1 == gridDim.x && __syncthreads_and(may_start(comm)) != 0)
    exchange_counts(args, epoch);
  if (!is_last_block(comm)) return;
  if (__syncthreads_and(may_start(comm)) == 0) void_counts(args);
  end_kernel(comm);
}

}  // namespace

cudaError_t load_notify() { return load<notify>(); }

cudaError_t launch_notify(const NotifyArgs& args, int num_sms, cudaStream_t stream) {
  // A few ids for each thread, and the block that exchanges.
  constexpr std::int64_t kIdsABlock = 4 * kThreads;
  const protocol::CallRecord& record = args.comm.record;
  const std::int64_t parts = (record.num_tokens + kTokensPerCount - 1) / kTokensPerCount;
  const std::int64_t for_parts = (parts * args.comm.num_ranks + kWarps - 1) / kWarps;
  const std::int64_t for_ids = (record.num_tokens * record.num_topk + kIdsABlock - 1) / kIdsABlock;
  const std::int64_t wanted = (for_parts > for_ids ? for_parts : for_ids) + 1;
  return launch_kernel(notify, wanted < num_sms ? wanted : num_sms, kThreads, 0, stream, args);
}

}  // namespace deep_ep::cuda::intranode
