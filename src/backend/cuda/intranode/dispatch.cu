#include "backend/cuda/device/places.cuh"
#include "backend/cuda/device/pump.cuh"
#include "backend/cuda/intranode/steps.hpp"
#include "plan/layout.hpp"

namespace deep_ep::cuda::intranode {

namespace {

// Four warps an SM, each with six stages of half a row of 7168 BF16 values: what a probe of pushing
// over NVLink needed to fill the link from 16 to 20 SMs.
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
using RowPump = Pump<6, 7168>;
using RowStorage = RowPump::Storage;

/// Where this rank's rows go at one receiver.
struct Target {
  plan::RecvArrays arrays;
  std::int64_t first_slot;
  std::int64_t num_rows;
};

struct Shared {
  RowStorage rows[kWarps];
  Target targets[kMaxRanks];
  protocol::CallRecord record;  // with the hash of the handle's routing
};

/// By all threads, true in each: every receiver's place is known and fits.
__device__ bool find_targets(const DispatchArgs& args, std::uint64_t epoch, Shared& shared) {
  const Comm& comm = args.comm;
  if (threadIdx.x < 32) {
    const std::uint64_t hash = args.cached ? warp_hash(args.rank_prefix_matrix, comm.num_ranks) : 0;
    if (threadIdx.x == 0) shared.record = comm.record;
    if (threadIdx.x == 0) shared.record.routing_hash = hash;
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    publish_place(comm, epoch, shared.record,
                  {args.block_segment, args.block_offset, args.block_rows});
  }
  bool good = true;
  for (int i = threadIdx.x; i < comm.num_ranks; i += kThreads) {
    std::byte* base = wait_place(comm, epoch, shared.record, i);
    if (base == nullptr) {
      good = false;
      continue;
    }
    const std::int64_t room = comm.control[comm.rank].block.inbox[i].rows;
    const auto rows = plan::rows_from(args.rank_prefix_matrix, comm.rank, i, comm.num_ranks);
    Target& target = shared.targets[i];
    Carver carver(base);
    target.arrays = plan::RecvArrays::carve(carver, args.format, room);
    target.first_slot = rows.begin;
    target.num_rows = rows.end - rows.begin;
    good = check_rows_fit(comm, i, rows.begin, rows.end - rows.begin, room) && good;
  }
  return __syncthreads_and(good) != 0;
}

/// The slot of a token's row at `rank`, or -1; a position that the handle's matrix does not know is
/// reported, and the row not sent.
__device__ std::int64_t slot_of(const DispatchArgs& args, const Shared& shared, std::int64_t token,
                                int rank) {
  const std::int32_t head = args.send_head[token * args.comm.num_ranks + rank];
  if (head == -1) return -1;
  const Target& target = shared.targets[rank];
  if (head >= 0 && head < target.num_rows) return target.first_slot + head;
  raise_bad_position(args.comm, token, rank, head, target.num_rows);
  return -1;
}

/// Expert ids become local ones; entries for experts of other ranks become -1 with weight 0.
__device__ void send_topk(const DispatchArgs& args, const plan::RecvArrays& to, std::int64_t token,
                          std::int64_t slot, int rank) {
  const int topk = args.comm.record.num_topk;
  const std::int64_t local_experts = args.comm.record.num_experts / args.comm.num_ranks;
  const std::int64_t first = rank * local_experts;
  for (int k = threadIdx.x % 32; k < topk; k += 32) {
    const std::int64_t id = args.topk_idx[token * topk + k];
    const bool here = id >= first && id < first + local_experts;
    const std::int64_t at = slot * topk + k;
    if (args.topk_idx.wide) {
      reinterpret_cast<std::int64_t*>(to.topk_idx)[at] = here ? id - first : -1;
    } else {
      reinterpret_cast<std::int32_t*>(to.topk_idx)[at] =
          here ? static_cast<std::int32_t>(id - first) : -1;
    }
    if (args.topk_weights == nullptr) continue;
    reinterpret_cast<float*>(to.topk_weights)[at] =
        here ? args.topk_weights[token * topk + k] : 0.0f;
  }
}

/// By a warp: all of a token's row but x.
__device__ void send_small(const DispatchArgs& args, const plan::RecvArrays& to, std::int64_t token,
                           std::int64_t slot, int rank) {
  const int lane = threadIdx.x % 32;
  if (args.scales.data != nullptr) {
    const std::int64_t scales = args.comm.record.num_scales;
    auto* row = reinterpret_cast<std::uint32_t*>(to.scales) + slot * scales;
    for (std::int64_t s = lane; s < scales; s += 32) {
      row[s] = args.scales.data[token * args.scales.row_stride + s * args.scales.column_stride];
    }
  }
  if (args.topk_idx.data != nullptr) send_topk(args, to, token, slot, rank);
  if (lane == 0) to.src_idx[slot] = static_cast<std::int32_t>(token);
}

/// By a warp: its tokens, every stride-th. Only this rank writes these slots, behind the acquire in
/// wait_place() (I5).
__device__ void send_rows(const DispatchArgs& args, Shared& shared) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int ranks = args.comm.num_ranks;
  const std::int64_t stride = std::int64_t{gridDim.x} * kWarps;
  const std::int64_t first = std::int64_t{warp} * gridDim.x + blockIdx.x;
  const std::int64_t tokens = args.comm.record.num_tokens;
  const std::int64_t mine = first < tokens ? (tokens - first + stride - 1) / stride : 0;
  const std::int64_t row_bytes = args.format.x_bytes;
  const std::int64_t pieces = (row_bytes + RowPump::kStageBytes - 1) / RowPump::kStageBytes;
  RowPump pump(shared.rows[warp]);
  pump.run(
      mine * pieces,
      [&](std::int64_t i) {
        const std::int64_t token = first + i / pieces * stride;
        const std::int64_t at = i % pieces * RowPump::kStageBytes;
        const std::int64_t left = row_bytes - at;
        return Piece{args.x + token * row_bytes + at,
                     static_cast<std::uint32_t>(
                         left < RowPump::kStageBytes ? left : std::int64_t{RowPump::kStageBytes})};
      },
      [&](std::int64_t i, const std::byte* from, std::uint32_t bytes) {
        const std::int64_t token = first + i / pieces * stride;
        const std::int64_t at = i % pieces * RowPump::kStageBytes;
        for (int begin = 0; begin < ranks; begin += 32) {
          const int rank = begin + lane;
          const std::int64_t slot = rank < ranks ? slot_of(args, shared, token, rank) : -1;
          if (slot >= 0)
            bulk_store(shared.targets[rank].arrays.x + slot * row_bytes + at, from, bytes);
          if (at != 0) continue;
          std::uint32_t set = __ballot_sync(0xffffffff, slot >= 0);
          for (; set != 0; set &= set - 1) {
            const int one = __ffs(set) - 1;
            const int to = begin + one;
            send_small(args, shared.targets[to].arrays, token, __shfl_sync(0xffffffff, slot, one),
                       to);
          }
        }
      });
  pump.finish();
}

/// Rows behind the received ones, which no peer writes.
__device__ void fill_unused_rows(const DispatchArgs& args, const plan::RecvArrays& own) {
  const int ranks = args.comm.num_ranks;
  const std::int64_t received =
      plan::rows_from(args.rank_prefix_matrix, ranks - 1, args.comm.rank, ranks).end;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  const std::int64_t begin = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  const std::int64_t unused = args.block_rows - received;
  for (std::int64_t i = begin; i < unused; i += step) own.src_idx[received + i] = -1;
  const std::int64_t id_words = args.format.topk_idx_bytes / 4;
  for (std::int64_t i = begin; i < unused * id_words; i += step) {
    reinterpret_cast<std::int32_t*>(own.topk_idx)[received * id_words + i] = -1;
  }
  const std::int64_t weights = args.format.topk_weights_bytes / 4;
  for (std::int64_t i = begin; i < unused * weights; i += step) {
    reinterpret_cast<float*>(own.topk_weights)[received * weights + i] = 0.0f;
  }
}

// --- by the last block
// ----------------------------------------------------------------------------

/// Tells each receiver that all rows of this rank are there, and waits for all that come here; true
/// in every thread if they came.
__device__ bool exchange_landed(const Comm& comm, std::uint64_t epoch) {
  for (int i = threadIdx.x; i < comm.num_ranks; i += kThreads) {
    const int rank = (comm.rank + 1 + i) % comm.num_ranks;
    // release: every block's rows are complete (Pump::finish()) and acquired in is_last_block().
    comm.control[rank].block.landed[comm.rank].publish(epoch);
  }
  bool good = true;
  for (int i = threadIdx.x; i < comm.num_ranks; i += kThreads) {
    const long long begin = clock64();
    const protocol::EpochFlag& landed = comm.control[comm.rank].block.landed[i];
    // acquire: pairs with publish() above at rank i.
    good = wait_for(
               comm, i, Wait::kRows, epoch, [&] { return landed.reached(epoch); },
               [&] { return landed.seen(); }) &&
           good;
    comm.local->waited[i] = static_cast<unsigned long long>(clock64() - begin);
  }
  return __syncthreads_and(good) != 0;
}

/// The first row of `source` whose token is at least `token`, counted from its first row.
__device__ std::int32_t rows_before(const std::int32_t* src_idx, plan::RowRange rows,
                                    std::int64_t token) {
  std::int64_t low = rows.begin;
  std::int64_t high = rows.end;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (src_idx[middle] < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<std::int32_t>(low - rows.begin);
}

/// What of the results belongs to the handle, which outlives the block.
__device__ void copy_bookkeeping(const DispatchArgs& args, std::uint64_t epoch,
                                 const plan::RecvArrays& own) {
  if (args.recv_src_idx == nullptr) return;
  const Comm& comm = args.comm;
  for (std::int64_t i = threadIdx.x; i < args.block_rows; i += kThreads) {
    args.recv_src_idx[i] = own.src_idx[i];
  }
  const protocol::Mailbox& mailbox = comm.control[comm.rank].block.mailbox[epoch % 2];
  for (int i = threadIdx.x; i < comm.num_ranks * args.num_channels; i += kThreads) {
    const int source = i / args.num_channels;
    const std::int64_t first = plan::channel_begin(mailbox.record[source].num_tokens,
                                                   i % args.num_channels, args.num_channels);
    const auto rows = plan::rows_from(args.rank_prefix_matrix, source, comm.rank, comm.num_ranks);
    args.recv_channel_prefix_matrix[i] = rows_before(own.src_idx, rows, first);
  }
}

__global__ void __launch_bounds__(kThreads) dispatch(const __grid_constant__ DispatchArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Comm& comm = args.comm;
  const std::uint64_t epoch = comm.local->epoch + 1;
  const bool good = block_may_start(comm) && find_targets(args, epoch, shared);
  if (good) {
    fill_unused_rows(args, shared.targets[comm.rank].arrays);
    send_rows(args, shared);
  }
  if (!is_last_block(comm)) return;
  if (good && exchange_landed(comm, epoch)) {
    copy_bookkeeping(args, epoch, shared.targets[comm.rank].arrays);
    flush_waits(comm, args.wait_stats);
  }
  end_kernel(comm);
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream) {
  constexpr int kShared = sizeof(Shared);
  static const cudaError_t prepared =
      cudaFuncSetAttribute(dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (prepared != cudaSuccess) return prepared;
  dispatch<<<num_sms, kThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::intranode
