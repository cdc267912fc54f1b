#include <type_traits>

#include "backend/cuda/internode_ll/combine.cuh"
#include "backend/cuda/internode_ll/wire.cuh"

// The kernels of combines whose rows come home in other formats than bfloat16, so that the one that
// most calls run is not larger for them. A row is in shared memory on both ends of its way.
namespace deep_ep::cuda::internode_ll {

namespace {

/// Eight values of what goes home, as partial() makes 24 of them.
__device__ uint4 partial_unit(const CombineArgs& args, int unit) {
  const auto* addends = shared_at<Addend>(args.shared.places);
  if (args.rank_major) return addends[0].row[unit];
  const int count = *shared_at<std::int32_t>(args.shared.num_places);
  Sum8 sum;
#pragma unroll 4
  for (int i = 0; i < count; ++i) sum.add(addends[i].row[unit], addends[i].weight);
  return sum.round();
}

template <class Wire>
struct WireRows {
  static __device__ std::int64_t x_bytes(const CombineArgs& args) { return 2 * args.hidden; }

  /// Behind a barrier: nobody reads the row in shared memory any more.
  static __device__ void send_home(const CombineArgs& args, const Ticket& ticket, int source,
                                   std::int64_t message, bool packeted) {
    auto* row = shared_at<std::byte>(args.shared.row);
    const auto units = static_cast<int>(args.hidden / 8);
#pragma unroll 1
    for (int unit = threadIdx.x; unit < units; unit += kThreads)
      Wire::put(partial_unit(args, unit), unit, args.wire_row, row);
    __syncthreads();
    send_staged(args, ticket, source, message, packeted);
  }

  static __device__ bool sum_token(const CombineArgs& args, const Ticket& ticket,
                                   std::int64_t token, const Route& route) {
    if (!await_rows(args, ticket, route)) return false;
    const auto* row = shared_at<std::byte>(args.shared.row);
    auto* sums = shared_at<float>(args.shared.sums);
    const auto units = static_cast<int>(args.hidden / 8);
    // A thread has the same units of all rows.
    for (int unit = threadIdx.x; unit < units; unit += kThreads)
      for (int i = 0; i < 8; ++i) sums[unit * 8 + i] = 0.0f;
    const int ranks = *route.num_ranks;
    bool good = true;
#pragma unroll 1
    for (int i = 0; i < ranks; ++i) {
      bool here = false;
      good = good && stage_row(args, ticket, route, i, here);
      // A row counts as a whole or not at all.
      if (__syncthreads_and(here) != 0) {
#pragma unroll 1
        for (int unit = threadIdx.x; unit < units; unit += kThreads)
          Wire::add(row, unit, args.wire_row, sums + unit * 8);
      }
      __syncthreads();
    }
    auto* out = reinterpret_cast<uint4*>(args.combined_x + token * x_bytes(args));
    for (int unit = threadIdx.x; unit < units; unit += kThreads) {
      Sum8 sum;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum.sums[i] = sums[unit * 8 + i];
      out[unit] = sum.round();
    }
    return __syncthreads_and(good) != 0;
  }

 private:
  /// By all threads, each its share: the row of the i-th rank of the route into shared memory.
  /// False: a fault. Sets `here` if this thread's share is.
  static __device__ bool stage_row(const CombineArgs& args, const Ticket& ticket,
                                   const Route& route, int i, bool& here) {
    auto* units = shared_at<uint4>(args.shared.row);
    const auto groups = static_cast<int>(args.places.returns.row_groups);
    here = true;
#pragma unroll 1
    for (int number = threadIdx.x; number < groups && here; number += kThreads) {
      here = false;
      const bool good = use_home(args, ticket, route, i, number, [&](const Group& group) {
#pragma unroll
        for (int u = 0; u < Group::kUnits; ++u) units[number * Group::kUnits + u] = group.units[u];
        here = true;
      });
      if (!good) return false;
    }
    return true;
  }

  /// By all threads: what is in shared memory, to its source.
  static __device__ void send_staged(const CombineArgs& args, const Ticket& ticket, int source,
                                     std::int64_t message, bool packeted) {
    const auto* staged = shared_at<uint4>(args.shared.row);
    send_groups(args, ticket, source, message, packeted, [&](int number, int units) {
      Group group = {};
#pragma unroll
      for (int u = 0; u < Group::kUnits; ++u)
        if (number * Group::kUnits + u < units) group.units[u] = staged[number * Group::kUnits + u];
      return group;
    });
  }
};

/// Sends, receives, or both. kFormat: plan::WireFormat.
template <int kFormat>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    combine(const __grid_constant__ CombineArgs args) {
  constexpr bool kLogFmt = kFormat == static_cast<int>(plan::WireFormat::kLogFmt);
  run_combine<WireRows<std::conditional_t<kLogFmt, LogFmtWire, Fp8Wire>>>(args);
}

constexpr auto kLogFmtKernel = combine<static_cast<int>(plan::WireFormat::kLogFmt)>;
constexpr auto kFp8Kernel = combine<static_cast<int>(plan::WireFormat::kFp8)>;

}  // namespace

cudaError_t launch_wire_combine(const CombineArgs& given, int num_sms, cudaStream_t stream) {
  CombineArgs args = given;
  args.wire_row = plan::WireRow::of(args.wire, args.hidden);
  args.shared.row = args.shared.take(args.places.returns.row_groups * MessageArea::kGroupBytes);
  args.shared.sums = args.shared.take(4 * args.hidden);
  return args.wire == plan::WireFormat::kLogFmt
             ? launch_combine_kernel<kLogFmtKernel>(args, num_sms, stream)
             : launch_combine_kernel<kFp8Kernel>(args, num_sms, stream);
}

cudaError_t load_wire_combine() {
  const cudaError_t status = load<kLogFmtKernel>();
  return status != cudaSuccess ? status : load<kFp8Kernel>();
}

}  // namespace deep_ep::cuda::internode_ll
