#pragma once

#include "backend/params.hpp"
#include "deep_ep/low_latency.hpp"

// Checks of the arguments of low latency that need no look at the data. All throw
// Error(kInvalidArgument) naming argument, value and what is allowed.
namespace deep_ep {

struct LowLatencyDispatchShape {
  plan::LowLatencyShape shape;
  protocol::CallRecord record{};
  internode_ll::Quantization quantization = internode_ll::Quantization::kNone;
  DType row_dtype = DType::kBfloat16;   // of recv_x
  DType scale_dtype = DType::kFloat32;  // of recv_x_scales, if num_scales > 0
  int num_scales = 0;
};
LowLatencyDispatchShape validate_dispatch(const LowLatencyDispatchArgs& args, int num_ranks,
                                          Device device);

struct LowLatencyCombineShape {
  plan::LowLatencyShape shape;
  plan::WireFormat wire = plan::WireFormat::kBfloat16;
  protocol::CallRecord record{};
};
LowLatencyCombineShape validate_combine(const LowLatencyCombineArgs& args, int num_ranks,
                                        Device device);

/// The outputs of a dispatch: as the caller brings them, checked, or without data where the call
/// has to allocate them. In the order of LowLatencyOutputs.
struct LowLatencyOutputViews {
  TensorView recv_x, recv_x_scales, recv_count, recv_topk_idx, recv_topk_weights, src_info,
      layout_range;
};
LowLatencyOutputViews validate_outputs(const LowLatencyDispatchArgs& args,
                                       const LowLatencyDispatchShape& shape, Device device);

/// Shapes of calls with these sizes, as size hints take them.
plan::LowLatencyShape low_latency_dispatch_shape(std::int64_t max_tokens, std::int64_t hidden,
                                                 int num_ranks, int num_experts, int num_topk);
plan::LowLatencyShape low_latency_combine_shape(std::int64_t max_tokens, std::int64_t hidden,
                                                int num_ranks, int num_experts, int num_topk);

}  // namespace deep_ep
