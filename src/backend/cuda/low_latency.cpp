#include "backend/cuda/low_latency.hpp"

#include <algorithm>

#include "backend/cuda/check.hpp"
#include "base/env.hpp"
#include "base/error.hpp"

namespace deep_ep::cuda {

namespace {

using deep_ep::internode_ll::Phases;
using deep_ep::internode_ll::Quantization;

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream.native); }

void check_launch(cudaError_t status, const char* name, const plan::LowLatencyShape& shape) {
  if (status == cudaErrorInvalidValue) {
    (void)cudaGetLastError();
    throw Error(ErrorCode::kUnsupported,
                fmt::format("{}: rows of {} bytes and {} experts are more than the shared memory "
                            "of an SM holds",
                            name, shape.row_bytes, shape.num_experts));
  }
  check(status, name);
}

}  // namespace

LowLatency::LowLatency(Context& context, const Internode& internode, const BackendOptions& options)
    : context_(context),
      internode_(internode),
      bytes_(options.low_latency_bytes),
      num_ranks_(options.num_ranks),
      may_shrink_(options.enable_shrink),
      last_ticket_(env::first_ticket() - 1) {
  start_tickets();
  // Not at first use, which may lie in a capture.
  if (may_shrink_) (void)mask_words_.get(num_ranks_ * std::int64_t{4});
  if (over_nodes()) (void)told_words();
}

/// Memory that begins as zeros counts from 1.
void LowLatency::start_tickets() {
  if (last_ticket_ == 0) return;
  const DeviceGuard guard(context_.device());
  auto state = std::make_unique<LowLatencyState>();
  *state = {};
  for (LowLatencyState::Block& block : state->blocks) block.sent[0] = block.sent[1] = last_ticket_;
  check(cudaMemcpy(&context_.comm({}).local->low_latency, state.get(), sizeof *state,
                   cudaMemcpyHostToDevice),
        "cudaMemcpy");
}

void LowLatency::fill(const deep_ep::internode_ll::Step& step, plan::LowLatencyKind kind,
                      internode_ll::StepArgs& args) {
  const Comm node = context_.comm(step.call);
  args.comm = over_nodes() ? internode_.comm_of_all(step.call) : node;
  args.fault = node.control(node.rank).block.fault;
  args.sends = has(step.phases, Phases::kSend);
  args.receives = has(step.phases, Phases::kReceive);
  args.rank_major = step.rank_major;
  args.kind = kind;
  args.shape = step.shape;
  if (step.shape.num_experts > internode_ll::StepArgs::kMaxExperts) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("num_experts is {}, on GPUs {} are allowed at most",
                            step.shape.num_experts, internode_ll::StepArgs::kMaxExperts));
  }
  args.set_experts(step.shape.num_local_experts());
  args.layout = over_nodes()
                    ? internode_.low_latency().near
                    : plan::LowLatencyLayout::carve(
                          node.bases[node.rank] + Context::control_bytes(context_.topology()),
                          bytes_, num_ranks_);
  args.places = args.layout.places(kind, 0, step.shape);
  args.topk_idx = {step.topk_idx.data, step.topk_idx.dtype == DType::kInt64};
  args.num_tokens = step.call.record.num_tokens;
  args.first_ticket = last_ticket_;
  args.ticket = step.ticket;
  if (may_shrink_)
    args.masks = static_cast<std::int32_t*>(mask_words_.get(num_ranks_ * std::int64_t{4}));
  args.wait_stats = step.wait_stats;
}

std::uint64_t* LowLatency::told_words() {
  return static_cast<std::uint64_t*>(
      told_words_.get(LowLatencyState::kParts * num_ranks_ * std::int64_t{8}));
}

template <class Args>
cudaError_t LowLatency::launch(const Args& args, const deep_ep::internode_ll::Step& step,
                               cudaError_t (*alone)(const Args&, int, cudaStream_t)) {
  const cudaStream_t stream = native(step.stream);
  if (!over_nodes()) return alone(args, context_.num_sms(), stream);
  internode_ll::OverNodes<Args> spread{args};
  spread.nodes = internode_.nodes(step.call, args);
  spread.nodes.told = told_words();
  return internode_.parts().launch(spread, context_.num_sms(), stream);
}

void LowLatency::dispatch(const deep_ep::internode_ll::DispatchParams& params) {
  internode_ll::DispatchArgs args;
  fill(params, plan::LowLatencyKind::kDispatch, args);
  args.x = params.x;
  args.quantize = params.quantization != Quantization::kNone;
  args.scaling = params.quantization == Quantization::kFp8Ue8m0 ? internode_ll::Scaling::kUe8m0
                 : params.quantization == Quantization::kFp8PowerOfTwo
                     ? internode_ll::Scaling::kPowerOfTwo
                     : internode_ll::Scaling::kFloat;
  if (params.x_scales.defined()) {
    args.x_scales = {params.x_scales.as<const std::uint32_t>(), params.x_scales.strides[0],
                     params.x_scales.strides[1]};
  }
  args.topk_weights = params.topk_weights;
  args.x_bytes = params.x_bytes;
  args.num_scales = params.num_scales;
  args.recv_x = params.recv_x;
  args.recv_scales = params.recv_x_scales.as<std::uint32_t>();
  std::copy_n(params.recv_x_scales.strides.begin(), 3, args.recv_scales_strides);
  args.recv_count = params.recv_count;
  args.recv_topk_idx = params.recv_topk_idx.data;
  args.recv_topk_weights = params.recv_topk_weights;
  args.src_info = params.src_info;
  args.layout_range = params.layout_range;
  args.cumulative_stats = params.cumulative_stats;
  check_launch(launch(args, params, internode_ll::launch_dispatch), "launch of dispatch",
               params.shape);
}

void LowLatency::combine(const deep_ep::internode_ll::CombineParams& params) {
  internode_ll::CombineArgs args;
  fill(params, plan::LowLatencyKind::kCombine, args);
  args.wire = params.wire;
  args.hidden = params.hidden;
  args.x = params.x;
  args.topk_weights = params.topk_weights;
  args.src_info = params.src_info;
  args.layout_range = params.layout_range;
  args.combined_x = params.combined_x;
  check_launch(launch(args, params, internode_ll::launch_combine), "launch of combine",
               params.shape);
}

void LowLatency::update_mask(int rank, bool masked, Stream stream) {
  auto* masks = static_cast<std::int32_t*>(mask_words_.get(num_ranks_ * std::int64_t{4}));
  check(internode_ll::launch_set_mask(masks, num_ranks_, rank, masked ? 1 : 0, native(stream)),
        "launch of set_mask");
}

void LowLatency::clean_mask(Stream stream) { update_mask(-1, false, stream); }

void LowLatency::query_mask(std::int32_t* masks, Stream stream) {
  check(cudaMemcpyAsync(masks, mask_words_.get(num_ranks_ * std::int64_t{4}),
                        static_cast<std::size_t>(num_ranks_) * 4, cudaMemcpyDeviceToDevice,
                        native(stream)),
        "cudaMemcpyAsync");
}

}  // namespace deep_ep::cuda
