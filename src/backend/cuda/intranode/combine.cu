#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/places.cuh"
#include "backend/cuda/device/pump.cuh"
#include "backend/cuda/device/sums.cuh"
#include "backend/cuda/intranode/steps.hpp"
#include "plan/layout.hpp"

namespace deep_ep::cuda::intranode {

namespace {

// Some warps push rows home, the others sum what has come home: both kinds of work of an SM run at
// the same time.
constexpr int kPushWarps = 4;
constexpr int kSumWarps = 16;
constexpr int kThreads = (kPushWarps + kSumWarps) * 32;
struct NoNote {};
using RowPump = Pump<6, 7168, NoNote>;
// 16-byte loads of a lane that are under way at once, of each of two rows.
constexpr int kUnroll = 4;

/// Rows of a piece: 16, or more where a rank has so many rows that kMaxChunks pieces would not do.
__device__ std::int64_t chunk_rows(std::int64_t count) {
  const std::int64_t least = (count + kMaxChunks - 1) / kMaxChunks;
  return least > 16 ? least : 16;
}

/// One other rank, as source of the rows that this one pushes, and as owner of rows that come here.
struct Other {
  // This rank's rows for it: from x_row on in x, to these places in its inbox.
  std::int64_t x_row;
  std::int64_t push_rows;
  std::byte* to_x;
  std::byte* to_weights;
  // Its rows for this rank, in this rank's inbox.
  std::int64_t count;
  const std::byte* from_x;
  const std::byte* from_weights;
};

struct Shared {
  RowPump::Storage rows[kPushWarps];
  Other others[kMaxRanks];
  const std::byte* x[kSumWarps][kMaxRanks];  // of the token that a warp sums
  const std::byte* weights[kSumWarps][kMaxRanks];
  unsigned long long waited[kMaxRanks];
  protocol::CallRecord record;  // with the hash of the handle's routing
};

/// Rows that `from` brings home to `source`.
__device__ plan::RowRange rows_of(const CombineArgs& args, int source, int from) {
  return plan::rows_from(args.rank_prefix_matrix, source, from, args.comm.num_ranks);
}

/// Where the rows of `from` begin in the inbox of `source`, and with `from` = R all of them.
__device__ std::int64_t inbox_begin(const CombineArgs& args, int source, int from) {
  std::int64_t begin = 0;
  for (int i = 0; i < from; ++i) {
    const plan::RowRange rows = rows_of(args, source, i);
    if (i != source) begin += rows.end - rows.begin;
  }
  return begin;
}

/// True, and `other` filled, if rank `i` agrees and everything fits.
__device__ bool find_other(const CombineArgs& args, std::uint64_t epoch,
                           const protocol::CallRecord& record, int i, Other& other) {
  const Comm& comm = args.comm;
  std::byte* theirs = wait_place(comm, epoch, record, i);
  if (theirs == nullptr) return false;
  const std::int64_t room = comm.control(comm.rank).place(epoch, i, comm.num_ranks).rows;
  const plan::RowRange push = rows_of(args, i, comm.rank);
  const plan::RowRange come = rows_of(args, comm.rank, i);
  other.x_row = push.begin;
  other.push_rows = push.end - push.begin;
  other.count = come.end - come.begin;
  const std::int64_t there = inbox_begin(args, i, comm.rank);
  const std::int64_t here = inbox_begin(args, comm.rank, i);
  if (!check_rows_fit(comm, comm.rank, push.begin, other.push_rows, args.num_rows)) return false;
  if (i == comm.rank) return true;
  if (!check_rows_fit(comm, i, there, other.push_rows, room) ||
      !check_rows_fit(comm, comm.rank, here, other.count, args.inbox_rows))
    return false;
  Carver to(theirs);
  const auto inbox = plan::RecvArrays::carve(to, args.format, room);
  other.to_x = inbox.x + there * args.format.x_bytes;
  other.to_weights = inbox.topk_weights + there * args.format.topk_weights_bytes;
  // The address under which kernels of this rank know its own segment.
  Carver from(segment_base(comm, comm.rank, args.inbox_segment) + args.inbox_offset);
  const auto own = plan::RecvArrays::carve(from, args.format, args.inbox_rows);
  other.from_x = own.x + here * args.format.x_bytes;
  other.from_weights = own.topk_weights + here * args.format.topk_weights_bytes;
  return true;
}

/// By all threads, true in each: all ranks agree and their inboxes are known.
__device__ bool find_others(const CombineArgs& args, std::uint64_t epoch, Shared& shared) {
  if (threadIdx.x < 32) {
    const std::uint64_t hash = warp_hash(args.rank_prefix_matrix, args.comm.num_ranks);
    if (threadIdx.x == 0) shared.record = args.comm.record;
    if (threadIdx.x == 0) shared.record.routing_hash = hash;
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    publish_place(args.comm, epoch, shared.record,
                  {args.inbox_segment, args.inbox_offset, args.inbox_rows});
  }
  bool good = true;
  for (int i = threadIdx.x; good && i < args.comm.num_ranks; i += kThreads) {
    shared.waited[i] = 0;
    good = may_start(args.comm) && find_other(args, epoch, shared.record, i, shared.others[i]);
  }
  return __syncthreads_and(good) != 0;
}

// --- pushing ---------------------------------------------------------------------------

/// By a warp: rows [begin, begin + rows) of those for `source`, then the word that they are there.
__device__ void push_chunk(const CombineArgs& args, RowPump& pump, const Other& other, int source,
                           std::int64_t chunk, std::uint64_t epoch) {
  const std::int64_t size = chunk_rows(other.push_rows);
  const std::int64_t begin = chunk * size;
  const std::int64_t rows = other.push_rows - begin < size ? other.push_rows - begin : size;
  const std::int64_t row_bytes = args.format.x_bytes;
  const std::byte* from = args.x + (other.x_row + begin) * row_bytes;
  std::byte* to = other.to_x + begin * row_bytes;
  // Consecutive at both ends.
  const std::int64_t bytes = rows * row_bytes;
  pump.run((bytes + RowPump::kStageBytes - 1) / RowPump::kStageBytes,
           [&](std::int64_t i) { return piece_of<RowPump::kStageBytes>(from, bytes, i); },
           [](std::int64_t) { return NoNote{}; },
           [&](std::int64_t i, const std::byte* stage, std::uint32_t count, NoNote) {
             if (threadIdx.x % 32 == 0) bulk_store(to + i * RowPump::kStageBytes, stage, count);
           });
  if (args.topk_weights != nullptr) {
    const std::int64_t topk = args.comm.record.num_topk;
    const float* weights = args.topk_weights + (other.x_row + begin) * topk;
    float* there = reinterpret_cast<float*>(other.to_weights) + begin * topk;
    for (std::int64_t i = threadIdx.x % 32; i < rows * topk; i += 32) there[i] = weights[i];
  }
  pump.finish();
  if (threadIdx.x % 32 != 0) return;
  // release: pairs with the acquire in wait_chunk() of the source.
  protocol::store_release(
      args.comm.control(source).chunks + std::int64_t{args.comm.rank} * kMaxChunks + chunk, epoch);
}

/// By a push warp: its chunks, of all sources in turn, so that all of them can begin to sum.
__device__ void push_rows(const CombineArgs& args, Shared& shared, std::uint64_t epoch) {
  const Comm& comm = args.comm;
  const int warp = threadIdx.x / 32;
  RowPump pump(shared.rows[warp]);
  std::int64_t most = 0;
  for (int i = 0; i < comm.num_ranks; ++i) {
    if (i == comm.rank) continue;
    const std::int64_t rows = shared.others[i].push_rows;
    const std::int64_t chunks = (rows + chunk_rows(rows) - 1) / chunk_rows(rows);
    most = chunks > most ? chunks : most;
  }
  const int others = comm.num_ranks - 1;
  for (std::int64_t unit = std::int64_t{warp} * gridDim.x + blockIdx.x; unit < most * others;
       unit += std::int64_t{gridDim.x} * kPushWarps) {
    const int source = static_cast<int>((comm.rank + 1 + unit % others) % comm.num_ranks);
    const std::int64_t chunk = unit / others;
    const Other& other = shared.others[source];
    if (chunk * chunk_rows(other.push_rows) < other.push_rows)
      push_chunk(args, pump, other, source, chunk, epoch);
  }
}

// --- summing ---------------------------------------------------------------------------

/// By one thread: the rows of `rank` around position `head` are here.
__device__ bool wait_chunk(const CombineArgs& args, Shared& shared, int rank, std::int32_t head,
                           std::uint64_t epoch) {
  const Comm& comm = args.comm;
  const std::uint64_t* word = comm.control(comm.rank).chunks + std::int64_t{rank} * kMaxChunks +
                              head / chunk_rows(shared.others[rank].count);
  // acquire: pairs with the release in push_chunk() of the rank.
  if (protocol::load_acquire(word) == epoch) return true;
  const long long begin = clock64();
  const bool here = wait_for(
      comm, rank, Wait::kRows, epoch, [&] { return protocol::load_acquire(word) == epoch; },
      [&] { return protocol::load_relaxed(word); });
  atomicMax(&shared.waited[rank], static_cast<unsigned long long>(clock64() - begin));
  return here;
}

/// By a warp: lists where the token's rows lie, in ascending rank, once they are all here. Returns
/// how many there are, or -1 if a wait failed or the handle is wrong.
__device__ int gather(const CombineArgs& args, Shared& shared, int warp, std::int64_t token,
                      std::uint64_t epoch) {
  const Comm& comm = args.comm;
  const int lane = threadIdx.x % 32;
  int found = 0;
  for (int begin = 0; begin < comm.num_ranks; begin += 32) {
    const int rank = begin + lane;
    const std::int32_t head =
        rank < comm.num_ranks ? args.send_head[token * comm.num_ranks + rank] : -1;
    bool good = true;
    if (head != -1) {
      const Other& other = shared.others[rank];
      good = head >= 0 && head < other.count;
      if (!good) raise_invalid(comm, Finding::kBadPosition, token, rank, head, other.count);
      if (good && rank != comm.rank) good = wait_chunk(args, shared, rank, head, epoch);
    }
    if (!__all_sync(0xffffffff, good)) return -1;
    const std::uint32_t set = __ballot_sync(0xffffffff, head != -1);
    if (head != -1) {
      const Other& other = shared.others[rank];
      const int at = found + __popc(set & ((1u << lane) - 1));
      const bool own = rank == comm.rank;
      const std::int64_t row = own ? other.x_row + head : head;
      shared.x[warp][at] = (own ? args.x : other.from_x) + row * args.format.x_bytes;
      shared.weights[warp][at] =
          (own ? reinterpret_cast<const std::byte*>(args.topk_weights) : other.from_weights) +
          row * args.format.topk_weights_bytes;
    }
    found += __popc(set);
  }
  // What each lane acquired is visible to all.
  __syncwarp();
  return found;
}

/// By a lane: kSteps times 16 bytes of the token's sum.
template <class T, int kSteps>
__device__ void sum_columns(const CombineArgs& args, const std::byte* const* rows, int count,
                            std::int64_t token, std::int64_t at) {
  Sum16<T> sums[kSteps];
  add_all(sums, rows, count, at);
  const std::int64_t row = token * args.format.x_bytes;
  for (const std::byte* bias : args.bias) {
    if (bias == nullptr) continue;
    const std::byte* from = bias + row;
    add_rows<T, kSteps, 1>(sums, &from, at);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    *reinterpret_cast<uint4*>(args.combined_x + row + at + step * 512) = sums[step].round();
  }
}

template <class T>
__device__ void sum_token(const CombineArgs& args, const Shared& shared, int warp, int count,
                          std::int64_t token) {
  const int lane = threadIdx.x % 32;
  const std::int64_t bytes = args.format.x_bytes;
  for_each_column<kUnroll>(bytes, [&](std::int64_t at, auto steps) {
    sum_columns<T, steps.kCount>(args, shared.x[warp], count, token, at);
  });
  if (args.combined_topk_weights == nullptr) return;
  const int topk = args.comm.record.num_topk;
  for (int k = lane; k < topk; k += 32) {
    float sum = 0.0f;
    for (int i = 0; i < count; ++i) {
      sum = plan::add(sum, reinterpret_cast<const float*>(shared.weights[warp][i])[k]);
    }
    args.combined_topk_weights[token * topk + k] = plan::from_float<float>(sum);
  }
}

/// By a warp, for a token that cannot be summed: NaN, so that nobody takes it for a result. In a
/// replayed graph the caller learns of the fault only later.
__device__ void void_token(const CombineArgs& args, std::int64_t token) {
  const int lane = threadIdx.x % 32;
  auto* row = reinterpret_cast<std::uint32_t*>(args.combined_x + token * args.format.x_bytes);
  for (std::int64_t i = lane; i < args.format.x_bytes / 4; i += 32) row[i] = 0xffffffff;
  if (args.combined_topk_weights == nullptr) return;
  const int topk = args.comm.record.num_topk;
  for (int k = lane; k < topk; k += 32)
    reinterpret_cast<std::uint32_t*>(args.combined_topk_weights)[token * topk + k] = 0xffffffff;
}

/// By a sum warp: its tokens, every stride-th; `good` as long as nothing has failed.
template <class T>
__device__ void sum_rows(const CombineArgs& args, Shared& shared, std::uint64_t epoch, bool good) {
  const int warp = static_cast<int>(threadIdx.x / 32) - kPushWarps;
  for (std::int64_t token = std::int64_t{warp} * gridDim.x + blockIdx.x;
       token < args.comm.record.num_tokens; token += std::int64_t{gridDim.x} * kSumWarps) {
    const int count = good ? gather(args, shared, warp, token, epoch) : -1;
    good = count >= 0;
    if (good) {
      sum_token<T>(args, shared, warp, count, token);
      __syncwarp();
    } else {
      void_token(args, token);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Comm& comm = args.comm;
  const std::uint64_t epoch = comm.local->epoch + 1;
  const bool good = find_others(args, epoch, shared);
  if (threadIdx.x >= kPushWarps * 32) {
    sum_rows<T>(args, shared, epoch, good);
  } else if (good) {
    push_rows(args, shared, epoch);
  }
  __syncthreads();
  for (int i = threadIdx.x; good && i < comm.num_ranks; i += kThreads) {
    atomicMax(&comm.local->waited[i], shared.waited[i]);
  }
  if (!is_last_block(comm)) return;
  flush_waits(comm, args.wait_stats);
  end_kernel(comm);
}

template <class T>
cudaError_t launch(const CombineArgs& args, int num_sms, cudaStream_t stream) {
  constexpr int kShared = sizeof(Shared);
  const cudaError_t allowed = allow_shared<combine<T>>(kShared);
  if (allowed != cudaSuccess) return allowed;
  combine<T><<<num_sms, kThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t load_combine() {
  return load<combine<__nv_bfloat162>, combine<__half2>, combine<float>>();
}

cudaError_t launch_combine(const CombineArgs& args, SumType type, int num_sms,
                           cudaStream_t stream) {
  switch (type) {
    case SumType::kBfloat16:
      return launch<__nv_bfloat162>(args, num_sms, stream);
    case SumType::kFloat16:
      return launch<__half2>(args, num_sms, stream);
    default:
      return launch<float>(args, num_sms, stream);
  }
}

}  // namespace deep_ep::cuda::intranode
