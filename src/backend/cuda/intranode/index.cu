#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/sum_up.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/intranode/local.cuh"
#include "backend/cuda/intranode/steps.hpp"
#include "plan/numerics.hpp"

// Where the groups of received rows are: count_rows, place_rows. Rows are counted in parts, so that
// many warps can place them and each expert's keep their order.
namespace deep_ep::cuda::intranode {

namespace {

constexpr int kPartRows = 128;
constexpr int kIndexWarps = 4;
constexpr int kIndexThreads = kIndexWarps * 32;
constexpr std::uint32_t kAll = 0xffffffff;
// Loads of a thread that are under way at once.
constexpr int kPartsTogether = 8;

__device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

__host__ __device__ std::int64_t parts_of(std::int64_t rows) {
  return (rows + kPartRows - 1) / kPartRows;
}

/// counts: [parts, L], first a part's rows (below 256) and entries of each expert in one word, then
/// the rows of the parts before; behind them [L] the rows of all, and 1 if the groups fit.
__device__ std::int32_t* totals(const GroupArgs& args) {
  return args.counts + parts_of(args.shape.num_rows) * args.shape.num_local_experts;
}
__device__ std::int32_t& fits(const GroupArgs& args) {
  return totals(args)[args.shape.num_local_experts];
}

/// What entries base .. base + 31 of a row name, a lane each; -1 for none.
__device__ int expert_at(const GroupArgs& args, std::int64_t row, std::int64_t base) {
  const std::int64_t k = base + lane();
  return k < args.shape.num_topk
             ? static_cast<int>(args.recv_topk_idx[row * args.shape.num_topk + k])
             : -1;
}

/// True if an entry before `base` names `expert` as well.
__device__ bool named_before(const GroupArgs& args, std::int64_t row, std::int64_t base,
                             int expert) {
  for (std::int64_t k = 0; k < base; ++k) {
    if (args.recv_topk_idx[row * args.shape.num_topk + k] == expert) return true;
  }
  return false;
}

// --- count_rows ------------------------------------------------------------------------

/// By a block: rows and entries of each expert in one part.
__device__ void count_part(const GroupArgs& args, std::int64_t part, std::int64_t rows,
                           std::int32_t* sums) {
  const int experts = args.shape.num_local_experts;
  for (int e = threadIdx.x; e < experts; e += kIndexThreads) sums[e] = 0;
  __syncthreads();
  const std::int64_t begin = part * kPartRows;
  const std::int64_t end = begin + kPartRows < rows ? begin + kPartRows : rows;
  for (std::int64_t row = begin + threadIdx.x / 32; row < end; row += kIndexWarps) {
    for (std::int64_t base = 0; base < args.shape.num_topk; base += 32) {
      const int expert = expert_at(args, row, base);
      const std::uint32_t same = __match_any_sync(kAll, expert);
      if (expert < 0 || __ffs(same) - 1 != lane()) continue;
      const int fresh = base == 0 || !named_before(args, row, base, expert) ? 1 : 0;
      atomicAdd(sums + expert, __popc(same) << 8 | fresh);
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kIndexThreads)
    args.counts[part * experts + e] = sums[e];
  __syncthreads();
}

/// By a thread of the last block: what an expert has in each part becomes what it has in those
/// before. Returns its entries.
__device__ std::int64_t scan_parts(const GroupArgs& args, std::int64_t parts, int expert) {
  const int experts = args.shape.num_local_experts;
  std::int64_t entries = 0;
  std::int32_t rows = 0;
  for (std::int64_t part = 0; part < parts; part += kPartsTogether) {
    std::int32_t words[kPartsTogether];
#pragma unroll
    for (int i = 0; i < kPartsTogether; ++i)
      words[i] = part + i < parts ? args.counts[(part + i) * experts + expert] : 0;
#pragma unroll
    for (int i = 0; i < kPartsTogether; ++i) {
      if (part + i < parts) args.counts[(part + i) * experts + expert] = rows;
      rows += words[i] & 255;
      entries += words[i] >> 8;
    }
  }
  totals(args)[expert] = rows;
  return entries;
}

/// By the first warp of the last block: where each group begins, from its room [L].
__device__ void place_groups(const GroupArgs& args, const std::int32_t* room) {
  const int experts = args.shape.num_local_experts;
  const std::int64_t begin = sum_up(
      experts, [&](int expert) { return room[expert]; },
      [&](int expert, std::int64_t own, std::int64_t upto) {
        const std::int64_t at = upto - own;
        args.groups.group_offsets[expert] =
            at <= args.shape.num_grouped_rows ? static_cast<std::int32_t>(at) : 0;
      });
  const bool good = begin <= args.shape.num_grouped_rows;
  if (lane() == 0) {
    args.groups.group_offsets[experts] = good ? static_cast<std::int32_t>(begin) : 0;
    fits(args) = good ? 1 : 0;
  }
  if (good || lane() != 0) return;
  raise(args.comm, Finding::kGroupCapacity, kCapacityCode, args.comm.global_rank(args.comm.rank),
        begin, args.shape.num_grouped_rows);
}

__global__ void __launch_bounds__(kIndexThreads, 1)
    count_rows(const __grid_constant__ GroupArgs args) {
  extern __shared__ std::int32_t sums[];  // [L]
  wait_for_kernel_before();
  const std::int64_t rows = received_rows(args.num_received_rows, args.shape.num_rows);
  const std::int64_t parts = parts_of(rows);
  for (std::int64_t part = blockIdx.x; part < parts; part += gridDim.x)
    count_part(args, part, rows, sums);
  if (!is_last_block(args.comm)) return;
  for (int e = threadIdx.x; e < args.shape.num_local_experts; e += kIndexThreads) {
    // No group is larger than 2^31 - 1: entries are fewer, and what does not fit is refused.
    const std::int64_t room =
        plan::next_group_offset(0, scan_parts(args, parts, e), args.shape.expert_alignment);
    sums[e] = static_cast<std::int32_t>(room < INT32_MAX ? room : INT32_MAX);
  }
  __syncthreads();
  if (threadIdx.x < 32) place_groups(args, sums);
  __syncthreads();
  end_local_kernel(args.comm);
}

// --- place_rows ------------------------------------------------------------------------

/// By a warp: entries base .. base + 31 of a row, which name `expert`. next: [L] the next free
/// grouped row of each expert.
__device__ void place_entries(const GroupArgs& args, std::int64_t row, std::int64_t base,
                              int expert, std::int32_t* next) {
  const std::int64_t topk = args.shape.num_topk;
  const std::uint32_t same = __match_any_sync(kAll, expert);
  const bool leads = expert >= 0 && __ffs(same) - 1 == lane();
  const bool fresh = leads && (base == 0 || !named_before(args, row, base, expert));
  if (fresh) next[expert] += 1;
  __syncwarp();
  std::int32_t at = expert >= 0 ? next[expert] - 1 : -1;
  // Behind a fault somebody may still write to the ids that were counted.
  if (at >= args.shape.num_grouped_rows) at = -1;
  if (base + lane() < topk) args.groups.grouped_rows[row * topk + base + lane()] = at;
  if (fresh && at >= 0) args.groups.recv_rows[at] = static_cast<std::int32_t>(row);
  if (leads && at >= 0 && args.groups.weights != nullptr) {
    float weight = fresh ? 0.0f : args.groups.weights[at];
    for (std::uint32_t left = same; left != 0; left &= left - 1) {
      weight = plan::add(weight, args.recv_topk_weights[row * topk + base + __ffs(left) - 1]);
    }
    args.groups.weights[at] = plan::from_float<float>(weight);
  }
  // Of the row's next entries: what was written here is visible to all lanes.
  __syncwarp();
}

/// By a warp: the rows of one part, in order.
__device__ void place_part(const GroupArgs& args, std::int64_t part, std::int64_t rows,
                           std::int32_t* next) {
  const int experts = args.shape.num_local_experts;
  for (int e = lane(); e < experts; e += 32)
    next[e] = args.groups.group_offsets[e] + args.counts[part * experts + e];
  __syncwarp();
  const std::int64_t begin = part * kPartRows;
  const std::int64_t end = begin + kPartRows < rows ? begin + kPartRows : rows;
  constexpr int kTogether = 8;  // rows whose ids are under way at once
  for (std::int64_t row = begin; row < end; row += kTogether) {
    int ids[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) ids[i] = row + i < end ? expert_at(args, row + i, 0) : -1;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (row + i >= end) break;
      place_entries(args, row + i, 0, ids[i], next);
      for (std::int64_t base = 32; base < args.shape.num_topk; base += 32)
        place_entries(args, row + i, base, expert_at(args, row + i, base), next);
    }
  }
}

/// Grouped rows [begin, end) are nobody's.
__device__ void clear_index(const GroupArgs& args, std::int64_t begin, std::int64_t end,
                            std::int64_t thread, std::int64_t threads) {
  for (std::int64_t g = begin + thread; g < end; g += threads) {
    args.groups.recv_rows[g] = -1;
    if (args.groups.weights != nullptr) args.groups.weights[g] = 0.0f;
  }
}

__global__ void __launch_bounds__(kIndexThreads, 1)
    place_rows(const __grid_constant__ GroupArgs args) {
  extern __shared__ std::int32_t shared[];  // [kIndexWarps, L]
  const int experts = args.shape.num_local_experts;
  const int own = static_cast<int>(threadIdx.x / 32);
  const std::int64_t warp = std::int64_t{own} * gridDim.x + blockIdx.x;
  const std::int64_t warps = std::int64_t{gridDim.x} * kIndexWarps;
  const std::int64_t thread = blockIdx.x * std::int64_t{kIndexThreads} + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.x} * kIndexThreads;
  wait_for_kernel_before();
  const bool good = fits(args) != 0;
  const std::int64_t rows = good ? received_rows(args.num_received_rows, args.shape.num_rows) : 0;
  std::int32_t* next = shared + own * experts;
  for (std::int64_t part = warp; part < parts_of(rows); part += warps)
    place_part(args, part, rows, next);
  // What no row has.
  const std::int64_t topk = args.shape.num_topk;
  for (std::int64_t i = rows * topk + thread; i < args.shape.num_rows * topk; i += threads)
    args.groups.grouped_rows[i] = -1;
  for (std::int64_t e = warp; good && e < experts; e += warps)
    clear_index(args, args.groups.group_offsets[e] + totals(args)[e],
                args.groups.group_offsets[e + 1], lane(), 32);
  clear_index(args, args.groups.group_offsets[experts], args.shape.num_grouped_rows, thread,
              threads);
}

int blocks_for(std::int64_t units, int num_sms) {
  return static_cast<int>(units < 1 ? 1 : units < num_sms ? units : num_sms);
}

// More than this of dynamic shared memory a kernel must be allowed.
constexpr int kFreeShared = 48 << 10;

}  // namespace

cudaError_t load_index() { return load<count_rows, place_rows>(); }

std::int64_t group_count_bytes(const plan::GroupShape& shape) {
  return ((parts_of(shape.num_rows) + 1) * shape.num_local_experts + 1) * 4;
}

cudaError_t launch_index(const GroupArgs& args, int num_sms, cudaStream_t stream) {
  const std::int64_t parts = parts_of(args.shape.num_rows);
  const int sums = args.shape.num_local_experts * 4;
  const cudaError_t status =
      launch_kernel(count_rows, blocks_for(parts, num_sms), kIndexThreads, sums, stream, args);
  if (status != cudaSuccess) return status;
  const int next = kIndexWarps * sums;
  constexpr int kMost = kIndexWarps * protocol::ControlBlock::kMaxLocalExperts * 4;
  if (next > kFreeShared) {
    const cudaError_t allowed = allow_shared<place_rows>(kMost);
    if (allowed != cudaSuccess) return allowed;
  }
  const std::int64_t blocks = (parts + kIndexWarps - 1) / kIndexWarps;
  // Few parts leave SMs for what no row has.
  return launch_kernel(place_rows, blocks_for(blocks > 8 ? blocks : 8, num_sms), kIndexThreads,
                       next, stream, args);
}

}  // namespace deep_ep::cuda::intranode
