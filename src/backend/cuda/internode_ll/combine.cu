#include "backend/cuda/internode_ll/combine.cuh"

namespace deep_ep::cuda::internode_ll {

namespace {

/// Rows of bfloat16, as they are.
struct PlainRows {
  static __device__ std::int64_t x_bytes(const CombineArgs& args) { return args.shape.row_bytes; }

  static __device__ void send_home(const CombineArgs& args, const Ticket& ticket, int source,
                                   std::int64_t message, bool packeted) {
    send_groups(args, ticket, source, message, packeted,
                [&](int number, int units) { return partial(args, number, units); });
  }

  static __device__ bool sum_token(const CombineArgs& args, const Ticket& ticket,
                                   std::int64_t token, const Route& route) {
    if (!await_rows(args, ticket, route)) return false;
    const int ranks = *route.num_ranks;
    const auto units = static_cast<int>(args.shape.row_bytes / 16);
    auto* out = reinterpret_cast<uint4*>(args.combined_x + token * args.shape.row_bytes);
    bool good = true;
#pragma unroll 1
    for (int number = threadIdx.x; number < args.places.returns.row_groups; number += kThreads) {
      Sum16<__nv_bfloat162> sums[Group::kUnits];
#pragma unroll 1
      for (int i = 0; i < ranks && good; ++i)
        good = use_home(args, ticket, route, i, number, [&](const Group& group) {
#pragma unroll
          for (int u = 0; u < Group::kUnits; ++u) sums[u].add(group.units[u]);
        });
#pragma unroll
      for (int u = 0; u < Group::kUnits; ++u) {
        const int unit = number * Group::kUnits + u;
        if (unit < units) out[unit] = sums[u].round();
      }
    }
    return __syncthreads_and(good) != 0;
  }
};

/// Sends, receives, or both.
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    combine(const __grid_constant__ CombineArgs args) {
  run_combine<PlainRows>(args);
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& given, int num_sms, cudaStream_t stream) {
  CombineArgs args = given;
  args.shared = plan_combine(args);
  if (args.wire != plan::WireFormat::kBfloat16) return launch_wire_combine(args, num_sms, stream);
  return launch_combine_kernel<combine>(args, num_sms, stream);
}

cudaError_t load_combine() { return load<combine>(); }

}  // namespace deep_ep::cuda::internode_ll
