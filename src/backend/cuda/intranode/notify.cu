#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/intranode/exchange.cuh"
#include "backend/cuda/intranode/steps.hpp"
#include "plan/layout.hpp"

namespace deep_ep::cuda::intranode {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxLocalExperts = protocol::ControlBlock::kMaxLocalExperts;
constexpr int kGroups = kTokensPerCount / 32;  // of 32 tokens, whose bits a word holds

// --- positions: which of the rows for a rank each token is -----------------------------

/// A count and the kernel that it is of, in one word that is read and written whole.
__device__ std::uint64_t tagged(std::uint64_t epoch, std::uint32_t count) {
  return epoch << 32 | count;
}

/// By a warp: how many of the tokens before part `part` go to `rank`. Parts are counted by warps of
/// this or an earlier turn, which never wait for a later part.
__device__ std::int32_t count_before(const NotifyArgs& args, std::int64_t part, int rank,
                                     std::uint64_t epoch) {
  std::int32_t sum = 0;
  for (std::int64_t i = threadIdx.x % 32; i < part; i += 32) {
    const std::uint64_t* word = args.counts + i * args.comm.num_ranks + rank;
    std::uint64_t value;
    // The word holds all that there is to know, so its order with other words does not matter.
    while ((value = protocol::load_relaxed(word)) >> 32 != (epoch & 0xffffffff)) {
    }
    sum += static_cast<std::int32_t>(value);
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  return sum;
}

/// Rows for `rank` among the tokens before `end` of this part.
__device__ std::int32_t count_until(const std::uint32_t* bits, std::int64_t end) {
  std::int32_t sum = 0;
  for (int group = 0; group < kGroups && group * 32 < end; ++group) {
    const std::int64_t left = end - group * 32;
    sum += __popc(left >= 32 ? bits[group] : bits[group] & ((1u << left) - 1));
  }
  return sum;
}

__device__ void write_channels(const NotifyArgs& args, int rank, std::int64_t begin,
                               std::int64_t end, std::int32_t before, const std::uint32_t* bits) {
  const std::int64_t tokens = args.comm.record.num_tokens;
  for (int c = threadIdx.x % 32; c < args.num_channels; c += 32) {
    const std::int64_t last = plan::channel_begin(tokens, c + 1, args.num_channels);
    // Each boundary belongs to the part that ends at it or behind it; 0 to the first.
    if (last > end || (last <= begin && begin > 0)) continue;
    args.channel_prefix_matrix[std::int64_t{rank} * args.num_channels + c] =
        before + count_until(bits, last - begin);
  }
}

/// By a warp: the positions of one part's tokens among the rows for `rank`.
__device__ void place_part(const NotifyArgs& args, std::int64_t part, int rank,
                           std::uint64_t epoch) {
  const int ranks = args.comm.num_ranks;
  const std::int64_t tokens = args.comm.record.num_tokens;
  const std::int64_t begin = part * kTokensPerCount;
  const std::int64_t end = begin + kTokensPerCount < tokens ? begin + kTokensPerCount : tokens;
  const int lane = threadIdx.x % 32;
  std::uint32_t bits[kGroups];
  std::int32_t count = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const std::int64_t token = begin + group * 32 + lane;
    const bool goes = token < end && args.is_token_in_rank[token * ranks + rank];
    bits[group] = __ballot_sync(0xffffffff, goes);
    count += __popc(bits[group]);
  }
  if (lane == 0) protocol::store_relaxed(args.counts + part * ranks + rank, tagged(epoch, count));
  const std::int32_t before = count_before(args, part, rank, epoch);
  std::int32_t at = before;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const std::int64_t token = begin + group * 32 + lane;
    const bool goes = (bits[group] >> lane & 1) != 0;
    if (token < end) {
      args.send_head[token * ranks + rank] =
          goes ? at + __popc(bits[group] & ((1u << lane) - 1)) : -1;
    }
    at += __popc(bits[group]);
  }
  write_channels(args, rank, begin, end, before, bits);
  if (end == tokens && at != args.num_tokens_per_rank[rank] && lane == 0) {
    raise_invalid(args.comm, Finding::kCounts, rank, args.num_tokens_per_rank[rank], at);
  }
}

/// By all warps of the grid, in turn: part by part, so that no warp waits for a later turn.
__device__ void place_tokens(const NotifyArgs& args, std::uint64_t epoch, int blocks) {
  const std::int64_t tokens = args.comm.record.num_tokens;
  const std::int64_t parts = tokens == 0 ? 1 : (tokens + kTokensPerCount - 1) / kTokensPerCount;
  const int ranks = args.comm.num_ranks;
  for (std::int64_t unit = blockIdx.x * kWarps + threadIdx.x / 32; unit < parts * ranks;
       unit += std::int64_t{blocks} * kWarps) {
    place_part(args, unit / ranks, static_cast<int>(unit % ranks), epoch);
  }
}

// --- checks ----------------------------------------------------------------------------

__device__ __noinline__ void raise_bad_id(const NotifyArgs& args, std::int64_t entry,
                                          std::int64_t id) {
  const protocol::CallRecord& record = args.comm.record;
  const bool known = id >= 0 && id < record.num_experts;
  raise_invalid(
      args.comm, known ? Finding::kNotInRank : Finding::kBadExpert, entry / record.num_topk,
      entry % record.num_topk, id,
      known ? id / (record.num_experts / args.comm.num_ranks) : std::int64_t{record.num_experts});
}

/// By all threads but those of the block that exchanges: ids in range, and in is_token_in_rank.
__device__ void check_ids(const NotifyArgs& args, int blocks) {
  if (args.topk_idx.data == nullptr) return;
  constexpr int kTogether = 4;  // loads under way at once
  const protocol::CallRecord& record = args.comm.record;
  const std::uint32_t experts = record.num_experts;
  const std::uint32_t local_experts = experts / args.comm.num_ranks;
  const std::uint32_t topk = record.num_topk;
  // Below 2^31: validated with the call.
  const auto count = static_cast<std::uint32_t>(record.num_tokens * topk);
  const std::uint32_t step = blocks * kThreads;
  for (std::uint32_t base = blockIdx.x * kThreads + threadIdx.x; base < count;
       base += step * kTogether) {
    std::int64_t ids[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      ids[i] = base + i * step < count ? args.topk_idx[base + i * step] : -1;
    bool in_rank[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const bool known = ids[i] >= 0 && ids[i] < experts;
      const std::uint32_t token = (base + i * step) / topk;
      in_rank[i] =
          ids[i] == -1 ||
          (known && args.is_token_in_rank[std::int64_t{token} * args.comm.num_ranks +
                                          static_cast<std::uint32_t>(ids[i]) / local_experts]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (!in_rank[i]) raise_bad_id(args, base + i * step, ids[i]);
    }
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
      Report report;
      report.finding = Finding::kCapacity;
      report.code = kCapacityCode;
      report.rank = to;
      report.values[0] = sum;
      report.values[1] = args.max_rows;
      raise(args.comm, report);
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
  const std::uint64_t epoch = comm.local->epoch + 1;
  // The last block exchanges, if there are others to do the rest.
  const int blocks = gridDim.x == 1 ? 1 : static_cast<int>(gridDim.x) - 1;
  // Tokens are placed whatever has failed: warps of several blocks wait for each other's counts,
  // and each block would see a fault at another time.
  if (blockIdx.x < blocks) {
    place_tokens(args, epoch, blocks);
    check_ids(args, blocks);
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
  notify<<<static_cast<int>(wanted < num_sms ? wanted : num_sms), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::intranode
