#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/sums.cuh"
#include "backend/cuda/device/waiting.cuh"
#include "backend/cuda/intranode/local.cuh"
#include "backend/cuda/intranode/steps.hpp"

namespace deep_ep::cuda::intranode {

namespace {

constexpr int kMaxWarps = 16;
constexpr int kMaxThreads = kMaxWarps * 32;
// Of shared memory, for the lists of all warps.
constexpr int kListBytes = 128 << 10;
constexpr std::uint32_t kAll = 0xffffffff;
// 16-byte loads of a lane that are under way at once: so many steps of so many rows.
constexpr int kUnroll = 4;
constexpr int kRowsTogether = 2;

__device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

/// By a warp: the first grouped row of a received row behind `last`, kAll if there is none. So rows
/// come in ascending order, which is that of the experts, each once.
__device__ std::uint32_t next_row(const ReduceArgs& args, std::int64_t row, std::int64_t last) {
  std::uint32_t next = kAll;
  for (std::int64_t k = lane(); k < args.num_topk; k += 32) {
    const std::int32_t at = args.grouped_rows[row * args.num_topk + k];
    if (at < -1 || at >= args.num_grouped_rows) {
      raise_invalid(args.comm, Finding::kBadGroup, row, k, at, args.num_grouped_rows);
    } else if (at > last && static_cast<std::uint32_t>(at) < next) {
      next = static_cast<std::uint32_t>(at);
    }
  }
  return __reduce_min_sync(kAll, next);
}

/// A grouped row of the received row that a warp sums.
struct Source {
  std::int32_t row;
  float weight;
};

/// The most that a row can have: one for each local expert.
__host__ __device__ std::int64_t most_sources(const ReduceArgs& args) {
  constexpr std::int64_t kMost = protocol::ControlBlock::kMaxLocalExperts;
  return args.num_topk < kMost ? args.num_topk : kMost;
}

/// By a warp: lists a received row's grouped rows, and returns how many there are. Without weights
/// they weigh 1: fma(1, x, sum) is the sum.
__device__ int list_sources(const ReduceArgs& args, std::int64_t row, Source* list) {
  int count = 0;
  for (std::uint32_t at = next_row(args, row, -1); at != kAll && count < most_sources(args);
       at = next_row(args, row, at)) {
    if (lane() == 0)
      list[count] = {static_cast<std::int32_t>(at),
                     args.weights == nullptr ? 1.0f : args.weights[at]};
    ++count;
  }
  __syncwarp();
  return count;
}

/// By a lane: kSteps times 16 bytes of kRows rows, added in order; all loads before the first use.
template <class T, int kSteps, int kRows>
__device__ void add_rows(const ReduceArgs& args, Sum16<T> (&sums)[kSteps], const Source* list,
                         std::int64_t at) {
  uint4 bytes[kRows][kSteps];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const std::byte* from = args.x + list[i].row * args.x_bytes + at;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      bytes[i][step] = *reinterpret_cast<const uint4*>(from + step * 512);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) sums[step].add(bytes[i][step], list[i].weight);
  }
}

/// By a lane: kSteps times 16 bytes of a received row's sum.
template <class T, int kSteps>
__device__ void sum_columns(const ReduceArgs& args, const Source* list, int count, std::int64_t row,
                            std::int64_t at) {
  Sum16<T> sums[kSteps];
  int i = 0;
  for (; i + kRowsTogether <= count; i += kRowsTogether)
    add_rows<T, kSteps, kRowsTogether>(args, sums, list + i, at);
  for (; i < count; ++i) add_rows<T, kSteps, 1>(args, sums, list + i, at);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    *reinterpret_cast<uint4*>(args.reduced + row * args.x_bytes + at + step * 512) =
        sums[step].round();
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    reduce_rows(const __grid_constant__ ReduceArgs args) {
  extern __shared__ Source lists[];  // [warps, most_sources()]
  const Comm& comm = args.comm;
  wait_for_kernel_before();
  const std::int64_t rows = received_rows(args.num_received_rows, args.num_rows);
  const std::int64_t warp = threadIdx.x / 32;
  Source* list = lists + warp * most_sources(args);
  for (std::int64_t row = warp * gridDim.x + blockIdx.x; row < rows;
       row += std::int64_t{gridDim.x} * (blockDim.x / 32)) {
    const int count = list_sources(args, row, list);
    std::int64_t at = lane() * 16;
    for (; at + (kUnroll - 1) * 512 < args.x_bytes; at += kUnroll * 512)
      sum_columns<T, kUnroll>(args, list, count, row, at);
    for (; at < args.x_bytes; at += 512) sum_columns<T, 1>(args, list, count, row, at);
    __syncwarp();
  }
  if (is_last_block(comm)) end_local_kernel(comm);
}

template <class T>
cudaError_t launch(const ReduceArgs& args, int num_sms, cudaStream_t stream) {
  const std::int64_t list = most_sources(args) * static_cast<std::int64_t>(sizeof(Source));
  const int warps =
      list * kMaxWarps <= kListBytes ? kMaxWarps : static_cast<int>(kListBytes / list);
  const cudaError_t allowed = allow_shared<reduce_rows<T>>(kListBytes);
  if (allowed != cudaSuccess) return allowed;
  return launch_kernel(reduce_rows<T>, num_sms, warps * 32, warps * list, stream, args);
}

}  // namespace

cudaError_t load_reduce() {
  return load<reduce_rows<__nv_bfloat162>, reduce_rows<__half2>, reduce_rows<float>>();
}

cudaError_t launch_reduce(const ReduceArgs& args, SumType type, int num_sms, cudaStream_t stream) {
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
