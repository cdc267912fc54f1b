#include "backend/cuda/groups.hpp"

#include "backend/cuda/check.hpp"
#include "base/error.hpp"

namespace deep_ep::cuda {

void require_aligned(const void* data, const char* name) {
  constexpr std::uintptr_t kAlignment = 16;
  require(reinterpret_cast<std::uintptr_t>(data) % kAlignment == 0,
          "{} begins at {}, on GPUs it must be a multiple of {} bytes", name, data, kAlignment);
}

void set_step(const DispatchStep& params, DispatchStepArgs& args) {
  require_aligned(params.source.x, "x");
  args.x = params.source.x;
  const TensorView& scales = params.source.scales;
  if (scales.defined())
    args.scales = {scales.as<const std::uint32_t>(), scales.strides[0], scales.strides[1]};
  args.topk_idx = ids_of(params.source.topk_idx);
  args.topk_weights = params.source.topk_weights;
  args.format = params.format;
  args.block_segment = params.block.segment;
  args.block_offset = params.block.offset;
  args.block_rows = params.block_rows;
  args.x_segment = params.x_block.segment;
  args.x_offset = params.x_block.offset;
  args.wait_stats = params.wait_stats;
}

void copy_outputs(Context& context, const DispatchStep& params) {
  const auto copy = [&](std::byte* to, const std::byte* from, std::int64_t row_bytes) {
    if (to == nullptr || params.block_rows * row_bytes == 0) return;
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(params.block_rows * row_bytes),
                          cudaMemcpyDeviceToDevice, context.comm_stream()),
          "copy of results");
  };
  const auto base = [&](const fabric::Block& block) {
    return block.segment < 0 ? nullptr
                             : context.fabric().own_segment(block.segment)->base() + block.offset;
  };
  Carver carver(base(params.block));
  const auto own =
      plan::RecvArrays::carve(carver, params.format, params.block_rows, base(params.x_block));
  copy(params.outputs.x, own.x, params.format.x_bytes);
  copy(params.outputs.scales, own.scales, params.format.scale_bytes);
  copy(params.outputs.topk_idx, own.topk_idx, params.format.topk_idx_bytes);
  copy(params.outputs.topk_weights, own.topk_weights, params.format.topk_weights_bytes);
}

void group_rows(Context& context, const deep_ep::intranode::GroupParams& params,
                std::int32_t* counts) {
  intranode::GroupArgs args;
  args.comm = context.comm(params.call);
  args.shape = params.shape;
  args.num_received_rows = params.num_received_rows;
  args.recv_topk_idx = ids_of(params.recv_topk_idx);
  args.recv_topk_weights = params.recv_topk_weights;
  args.groups = params.groups;
  args.x_bytes = params.x_bytes;
  args.scale_words = params.scale_bytes / 4;
  args.x = params.x;
  args.scales = reinterpret_cast<const std::uint32_t*>(params.scales);
  args.grouped_x = params.grouped_x;
  args.grouped_scales = reinterpret_cast<std::uint32_t*>(params.grouped_x_scales);
  const int sms = sms_of(context, params.call);
  if (!params.known) {
    args.counts = counts;
    check(intranode::launch_index(args, sms, context.comm_stream()), "launch of index");
  }
  check(intranode::launch_expand(args, sms, context.comm_stream()), "launch of expand_rows");
}

void reduce_rows(Context& context, const deep_ep::intranode::ReduceParams& params) {
  require_aligned(params.x, "x");
  intranode::ReduceArgs args;
  args.comm = context.comm(params.call);
  args.x = params.x;
  args.x_bytes = params.hidden * static_cast<std::int64_t>(size_of(params.dtype));
  args.num_grouped_rows = params.num_grouped_rows;
  args.weights = params.weights;
  args.num_received_rows = params.num_received_rows;
  args.grouped_rows = params.grouped_rows;
  args.num_rows = params.num_rows;
  args.num_topk = params.num_topk;
  args.reduced = params.reduced;
  check(intranode::launch_reduce(args, sum_type(params.dtype), sms_of(context, params.call),
                                 context.comm_stream()),
        "launch of reduce_rows");
}

}  // namespace deep_ep::cuda
