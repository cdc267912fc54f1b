#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/places.cuh"
#include "backend/cuda/device/sums.cuh"
#include "backend/cuda/intranode/push.cuh"
#include "backend/cuda/intranode/steps.hpp"
#include "plan/layout.hpp"

namespace deep_ep::cuda::intranode {

namespace {

// Some warps push rows home, the others sum what has come home: both kinds of work of an SM run at
// the same time. The last one tells what has been pushed.
constexpr int kSumWarps = 12;
constexpr int kThreads = (kPushWarps + kSumWarps + 1) * 32;
// 16-byte loads of a lane that are under way at once, of each of two rows.
constexpr int kUnroll = 4;
// Warps that share a token, if there are few.
constexpr int kMaxParts = 8;

struct Shared {
  PushPump::Storage rows[kPushWarps];
  PushedPieces pushed[kPushWarps];
  Other others[kMaxRanks];
  const std::byte* x[kSumWarps][kMaxRanks];  // of the token that a warp sums
  const std::byte* weights[kSumWarps][kMaxRanks];
  unsigned long long waited[kMaxRanks];
  protocol::CallRecord record;  // with the hash of the handle's routing
  Place inbox;                  // of this rank
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
  Place place;
  std::byte* theirs = wait_place(comm, epoch, record, i, place);
  if (theirs == nullptr) return false;
  const std::int64_t room = place.rows;
  const plan::RowRange push = rows_of(args, i, comm.rank);
  const plan::RowRange come = rows_of(args, comm.rank, i);
  other.x_row = push.begin;
  other.push_rows = push.end - push.begin;
  other.push_shift = chunk_shift(other.push_rows);
  other.count = come.end - come.begin;
  other.count_shift = chunk_shift(other.count);
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
  // Loaded here, looked at when there is nothing else to wait for.
  const std::uint32_t fault =
      protocol::load_relaxed(&args.comm.control(args.comm.rank).block.fault->state);
  if (threadIdx.x < 32) {
    const std::uint64_t hash = warp_hash(args.rank_prefix_matrix, args.comm.num_ranks);
    if (threadIdx.x == 0) {
      shared.record = args.comm.record;
      shared.record.routing_hash = hash;
      shared.inbox = {
          .segment = args.inbox_segment, .offset = args.inbox_offset, .rows = args.inbox_rows};
    }
  } else if (threadIdx.x < 32 + kPushWarps) {
    shared.pushed[threadIdx.x - 32] = {};
  }
  __syncthreads();
  if (blockIdx.x == 0) publish_place(args.comm, epoch, shared.record, shared.inbox);
  bool good = true;
  for (int i = threadIdx.x; good && i < args.comm.num_ranks; i += kThreads) {
    shared.waited[i] = 0;
    good = find_other(args, epoch, shared.record, i, shared.others[i]);
  }
  return __syncthreads_and(good && fault == protocol::FaultRecord::kNone) != 0;
}

// --- summing ---------------------------------------------------------------------------

/// By one thread: the rows of `rank` around position `head` are here.
__device__ bool wait_chunk(const CombineArgs& args, Shared& shared, int rank, std::int32_t head,
                           std::uint64_t epoch) {
  const Comm& comm = args.comm;
  const std::uint64_t* word = comm.control(comm.rank).chunks + std::int64_t{rank} * kMaxChunks +
                              (head >> shared.others[rank].count_shift);
  // acquire: pairs with the release in tell_pieces() of the rank.
  if (protocol::load_acquire(word) == epoch) return true;
  const long long begin = clock64();
  const bool here = wait_for(
      comm, rank, Wait::kRows, epoch, [&] { return protocol::load_acquire(word) == epoch; },
      [&] { return protocol::load_relaxed(word); });
  atomicMax(&shared.waited[rank], static_cast<unsigned long long>(clock64() - begin));
  return here;
}

/// The position of the token's row at `rank`, or -1.
__device__ std::int32_t head_of(const CombineArgs& args, std::int64_t token, int rank) {
  const Comm& comm = args.comm;
  if (token >= comm.record.num_tokens || rank >= comm.num_ranks) return -1;
  return args.send_head[token * comm.num_ranks + rank];
}

/// By a warp: lists where the token's rows lie, in ascending rank, once they are all here. Returns
/// how many there are, or -1 if a wait failed or the handle is wrong. `first_head` is that of the
/// lane's first rank.
__device__ int gather(const CombineArgs& args, Shared& shared, int warp, std::int64_t token,
                      std::int32_t first_head, std::uint64_t epoch) {
  const Comm& comm = args.comm;
  const int lane = threadIdx.x % 32;
  int found = 0;
  for (int begin = 0; begin < comm.num_ranks; begin += 32) {
    const int rank = begin + lane;
    const std::int32_t head = begin == 0 ? first_head : head_of(args, token, rank);
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

/// By a warp: the part-th of `parts` shares of a token's sum, in steps of kUnroll times 512 bytes.
template <class T>
__device__ void sum_token(const CombineArgs& args, const Shared& shared, int warp, int count,
                          std::int64_t token, unsigned part, unsigned parts) {
  constexpr int kStep = kUnroll * 512;
  const int lane = threadIdx.x % 32;
  const std::int64_t bytes = args.format.x_bytes;
  const auto steps = static_cast<unsigned>(bytes / kStep);  // what is left is the last part's
  const bool last = part + 1 == parts;
  const std::int64_t begin = std::int64_t{steps * part / parts} * kStep;
  const std::int64_t end = last ? bytes : std::int64_t{steps * (part + 1) / parts} * kStep;
  if (count <= 2 && args.bias[0] == nullptr && args.bias[1] == nullptr) {
    const auto row = [&](int i) { return i < count ? shared.x[warp][i] + begin : nullptr; };
    sum_pair<T>(row(0), row(1), static_cast<int>(end - begin),
                args.combined_x + token * bytes + begin);
  } else {
    for_each_column<kUnroll>(end - begin, [&](std::int64_t at, auto columns) {
      sum_columns<T, columns.kCount>(args, shared.x[warp], count, token, begin + at);
    });
  }
  if (!last) return;
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

/// By a sum warp: its shares of tokens, every stride-th; `good` as long as nothing has failed. Few
/// tokens are shared by several warps each.
template <class T>
__device__ void sum_rows(const CombineArgs& args, Shared& shared, std::uint64_t epoch, bool good) {
  const int warp = static_cast<int>(threadIdx.x / 32) - kPushWarps;
  const auto tokens = static_cast<unsigned>(args.comm.record.num_tokens);
  const unsigned stride = gridDim.x * kSumWarps;
  const int rank = threadIdx.x % 32;
  unsigned parts = 1;
  while (parts < kMaxParts && tokens * parts * 2 <= stride) parts *= 2;
  const int shift = 31 - __clz(parts);
  unsigned share = static_cast<unsigned>(warp) * gridDim.x + blockIdx.x;
  std::int32_t head = head_of(args, share >> shift, rank);
  for (; share >> shift < tokens; share += stride) {
    const unsigned token = share >> shift;
    const unsigned part = share & (parts - 1);
    const std::int32_t next_head = head_of(args, (share + stride) >> shift, rank);
    const int count = good ? gather(args, shared, warp, token, head, epoch) : -1;
    head = next_head;
    good = count >= 0;
    if (good) {
      sum_token<T>(args, shared, warp, count, token, part, parts);
      __syncwarp();
    } else {
      void_token(args, token);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) combine(const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Comm& comm = args.comm;
  wait_for_kernel_before();
  const std::uint64_t epoch = comm.local->epoch + 1;
  const bool good = find_others(args, epoch, shared);
  const auto warp = static_cast<int>(threadIdx.x / 32);
  if (warp < kPushWarps) {
    if (good) push_rows(args, shared.others, warp, shared.rows[warp], shared.pushed[warp]);
  } else if (warp < kPushWarps + kSumWarps) {
    sum_rows<T>(args, shared, epoch, good);
  } else if (good) {
    tell_pieces(args, shared.pushed, epoch);
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
  return launch_kernel(combine<T>, num_sms, kThreads, kShared, stream, args);
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
