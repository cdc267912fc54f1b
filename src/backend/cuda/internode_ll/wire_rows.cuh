#pragma once

#include <type_traits>

#include "backend/cuda/internode_ll/combine.cuh"
#include "backend/cuda/internode_ll/wire.cuh"

// The kernels of combines whose rows come home in other formats than bfloat16, so that the one that
// most calls run is not larger for them. A row is in shared memory on both ends of its way.
namespace deep_ep::cuda::internode_ll {

namespace {

template <class Wire>
struct WireRows {
  // A row has to be coded as all are.
  static constexpr bool kKeepsOwn = false;

  static __device__ std::int64_t x_bytes(const CombineArgs& args) { return 2 * args.hidden; }

  static __device__ void stage(const auto& args, const Slice&) {
    auto* row = shared_at<std::byte>(args.shared.row);
    const auto units = static_cast<int>(args.hidden / 8);
#pragma unroll 1
    for (int unit = threadIdx.x; unit < units; unit += kThreads)
      Wire::put(partial(args, unit), unit, args.wire_row, row);
  }

  static __device__ bool sum_token(const auto& args, const Ticket& ticket, std::int64_t token,
                                   const Slice&, const Route& route) {
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
  static __device__ bool stage_row(const auto& args, const Ticket& ticket, const Route& route,
                                   int i, bool& here) {
    auto* row = shared_at<std::byte>(args.shared.row);
    const Announced announced(args.shared, args.comm.num_ranks);
    const MessageArea& area = args.places.returns;
    const int rank = route.to_rank[i];
    here = rank >= 0;
    if (!here) return true;
    if (announced.packeted[rank] == 0) {
      copy_units(plain_home(args, ticket, route, i), row, 0,
                 static_cast<int>(area.plain_bytes / 16));
      return true;
    }
    const Packet* from = place_here(ticket.packet_shift, area.row(rank, route.to_message[i]));
    const Arrival arrival =
        take_packets(args, ticket, rank, from, slice_of(args, 0, 0), PlainWords{}, 0, row);
    here = arrival == Arrival::kHere;
    return arrival != Arrival::kFailed;
  }
};

constexpr int kLogFmt = static_cast<int>(plan::WireFormat::kLogFmt);
constexpr int kFp8 = static_cast<int>(plan::WireFormat::kFp8);

/// kFormat: one of these.
template <int kFormat>
using RowsOf = WireRows<std::conditional_t<kFormat == kLogFmt, LogFmtWire, Fp8Wire>>;

}  // namespace

/// Sends, receives, or both. Not of this file alone: a name that is would tell nothing.
template <int kFormat, class Args>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm<Args>)
    combine(const __grid_constant__ Formed<Args, Form::kAny> args) {
  run_combine<RowsOf<kFormat>>(args);
}

template <int kFormat, class Args>
cudaError_t launch_format(const Args& args, int num_sms, cudaStream_t stream) {
  return launch_form<combine<kFormat, Args>, Form::kAny>(args, num_blocks(args, num_sms, 1),
                                                         stream);
}

template <class Args>
cudaError_t launch_wire_combine_kernel(const Args& given, int num_sms, cudaStream_t stream) {
  Args args = given;
  args.wire_row = plan::WireRow::of(args.wire, args.hidden);
  args.shared.sums = args.shared.take(4 * args.hidden);
  return args.wire == plan::WireFormat::kLogFmt ? launch_format<kLogFmt>(args, num_sms, stream)
                                                : launch_format<kFp8>(args, num_sms, stream);
}

template <class Args>
cudaError_t load_wire_combine_kernels() {
  return load<combine<kLogFmt, Args>, combine<kFp8, Args>>();
}

}  // namespace deep_ep::cuda::internode_ll
