#include "api/validate.hpp"

#include "api/expect.hpp"
#include "base/error.hpp"

namespace deep_ep {

namespace {

/// What a dispatch takes of a handle.
void expect_sends(const IntranodeHandle& handle, int num_ranks, Device device) {
  const std::int64_t ranks = num_ranks;
  expect(handle.rank_prefix_matrix,
         {"handle.rank_prefix_matrix", device, {DType::kInt32}, {ranks, ranks}});
  expect(handle.is_token_in_rank, {"handle.is_token_in_rank", device, {DType::kBool}, {-1, ranks}});
  expect(handle.send_head,
         {"handle.send_head", device, {DType::kInt32}, {handle.is_token_in_rank.shape[0], ranks}});
}

void expect_handle(const IntranodeHandle& handle, int num_ranks, Device device) {
  expect_sends(handle, num_ranks, device);
  expect(handle.recv_src_idx, {"handle.recv_src_idx", device, {DType::kInt32}, {-1}});
}

void expect_tokens(const IntranodeHandle& handle, const TensorView& x) {
  require(handle.is_token_in_rank.shape[0] == x.shape[0],
          "x is {}, but the handle is of a dispatch of {} tokens", x,
          handle.is_token_in_rank.shape[0]);
}

void expect_stats(const TensorView& stats, const char* name, int num_ranks, Device device) {
  if (stats.defined()) expect(stats, {name, device, {DType::kInt64}, {num_ranks}});
}

void add_scales(const TensorView& scales, std::int64_t num_tokens, Device device,
                DispatchShape& shape) {
  if (!scales.defined()) return;
  expect(scales, {"x_scales", device, {DType::kFloat32, DType::kInt32}, {num_tokens, -1}, false});
  shape.record.scale_dtype = static_cast<std::int32_t>(scales.dtype);
  shape.record.num_scales = static_cast<std::int32_t>(scales.shape[1]);
  shape.format.scale_bytes = scales.shape[1] * static_cast<std::int64_t>(size_of(scales.dtype));
}

void add_topk(const DispatchArgs& args, Device device, DispatchShape& shape) {
  require(args.topk_idx.defined() || !args.topk_weights.defined(),
          "topk_weights is given without topk_idx");
  if (!args.topk_idx.defined()) return;
  const std::int64_t tokens = args.x.shape[0];
  require(shape.record.num_experts > 0, "topk_idx is given without num_tokens_per_expert");
  expect(args.topk_idx, {"topk_idx", device, {DType::kInt32, DType::kInt64}, {tokens, -1}});
  const std::int64_t topk = args.topk_idx.shape[1];
  require(topk >= 1 && topk <= INT32_MAX, "topk_idx is {}, it needs at least one column",
          args.topk_idx);
  require(tokens <= INT32_MAX / topk, "topk_idx is {}; it may have {} entries at most",
          args.topk_idx, INT32_MAX);
  shape.record.num_topk = static_cast<std::int32_t>(topk);
  shape.record.topk_dtype = static_cast<std::int32_t>(args.topk_idx.dtype);
  shape.format.topk_idx_bytes = topk * static_cast<std::int64_t>(size_of(args.topk_idx.dtype));
  if (!args.topk_weights.defined()) return;
  expect(args.topk_weights, {"topk_weights", device, {DType::kFloat32}, {tokens, topk}});
  shape.record.has_topk_weights = 1;
  shape.format.topk_weights_bytes = topk * 4;
}

}  // namespace

void add_prepared(const DispatchArgs& args, bool given, const char* handle, int num_ranks,
                  Device device, DispatchShape& shape) {
  const PreparedDispatch& prepared = *args.prepared;
  require(!given, "prepared and {} are both given, only one of them is allowed", handle);
  require(args.num_worst_tokens == 0,
          "num_worst_tokens is {}, it must be 0 together with prepared, whose rows are known",
          args.num_worst_tokens);
  require(prepared.num_recv_tokens >= 0 && prepared.num_recv_tokens <= INT32_MAX,
          "prepared.num_recv_tokens is {}, must be in [0, 2^31)", prepared.num_recv_tokens);
  require(prepared.num_experts >= 0 && prepared.num_experts % num_ranks == 0,
          "prepared.num_experts is {}, must be a multiple of the {} ranks", prepared.num_experts,
          num_ranks);
  require(prepared.expert_alignment >= 1, "prepared.expert_alignment is {}, must be at least 1",
          prepared.expert_alignment);
  shape.record.num_experts = prepared.num_experts;
  add_topk(args, device, shape);
}

void expect_groups(const RowGroups& groups, std::int64_t rows, Device device) {
  expect(groups.group_offsets, {"groups.group_offsets", device, {DType::kInt32}, {-1}});
  require(groups.group_offsets.shape[0] >= 2,
          "groups.group_offsets is {}, it needs an element for each local expert and one more",
          groups.group_offsets);
  expect(groups.grouped_rows, {"groups.grouped_rows", device, {DType::kInt32}, {rows, -1}});
  expect(groups.recv_rows, {"groups.recv_rows", device, {DType::kInt32}, {-1}});
  if (groups.weights.defined()) {
    expect(groups.weights,
           {"groups.weights", device, {DType::kFloat32}, {groups.recv_rows.shape[0]}});
  }
}

void validate_groups(const DispatchArgs& args, std::int64_t handle_rows, Device device) {
  const bool cached = handle_rows >= 0;
  const auto without = [](bool given, const char* name) {
    require(!given, "{} is given without group_rows", name);
  };
  without(!args.group_rows && args.groups, "groups");
  without(!args.group_rows && args.grouped_x.defined(), "grouped_x");
  without(!args.group_rows && args.grouped_x_scales.defined(), "grouped_x_scales");
  if (!args.group_rows) return;
  require(!args.groups || cached, "groups is given without handle");
  require(args.groups || !cached,
          "group_rows is true and handle is given, which needs groups, those of its dispatch");
  require(args.groups || args.topk_idx.defined(), "group_rows is true, which needs topk_idx");
  if (args.groups) expect_groups(*args.groups, handle_rows, device);
}

void refuse_with_handle(const DispatchArgs& args, const char* handle) {
  const auto refuse = [handle](const TensorView& tensor, const char* name) {
    require(!tensor.defined(), "{} is {}, it must not be given together with {}", name, tensor,
            handle);
  };
  refuse(args.topk_idx, "topk_idx");
  refuse(args.topk_weights, "topk_weights");
  refuse(args.layout.num_tokens_per_rank, "num_tokens_per_rank");
  refuse(args.layout.is_token_in_rank, "is_token_in_rank");
  refuse(args.layout.num_tokens_per_expert, "num_tokens_per_expert");
  require(args.num_worst_tokens == 0,
          "num_worst_tokens is {}, it must be 0 together with {}, whose rows are known",
          args.num_worst_tokens, handle);
}

void add_routing(const DispatchArgs& args, int num_ranks, Device device, DispatchShape& shape) {
  const std::int64_t tokens = args.x.shape[0];
  const DispatchLayout& layout = args.layout;
  expect(layout.num_tokens_per_rank, {"num_tokens_per_rank", device, {DType::kInt32}, {num_ranks}});
  expect(layout.is_token_in_rank,
         {"is_token_in_rank", device, {DType::kBool}, {tokens, num_ranks}});
  if (layout.num_tokens_per_expert.defined()) {
    expect(layout.num_tokens_per_expert, {"num_tokens_per_expert", device, {DType::kInt32}, {-1}});
    const std::int64_t experts = layout.num_tokens_per_expert.shape[0];
    require(experts > 0 && experts % num_ranks == 0 && experts <= INT32_MAX,
            "num_tokens_per_expert has {} elements, must be a positive multiple of the {} ranks",
            experts, num_ranks);
    shape.record.num_experts = static_cast<std::int32_t>(experts);
  }
  require(args.num_worst_tokens == 0 || args.topk_idx.defined(),
          "num_worst_tokens is {}, which needs topk_idx", args.num_worst_tokens);
  add_topk(args, device, shape);
}

void validate(const BufferOptions& options, int rank, int num_ranks) {
  require(num_ranks >= 1, "bootstrap has {} ranks, at least 1 is needed", num_ranks);
  require(rank >= 0 && rank < num_ranks, "bootstrap has rank {}, must be in [0, {})", rank,
          num_ranks);
  require(options.num_nvl_bytes >= 0, "num_nvl_bytes is {}, must not be negative",
          options.num_nvl_bytes);
  require(options.num_rdma_bytes >= 0, "num_rdma_bytes is {}, must not be negative",
          options.num_rdma_bytes);
  require(options.num_threads >= 0, "num_threads is {}, must not be negative", options.num_threads);
}

void validate(const CallOptions& options) {
  require(!options.allocate_on_comm_stream || (options.previous_event && options.async_finish),
          "allocate_on_comm_stream is true, which needs previous_event and async_finish");
}

void validate_num_experts(const DispatchArgs& args) {
  require(!args.handle, "num_experts is {}, it must not be given together with handle",
          args.num_experts);
  const DispatchLayout& layout = args.layout;
  require(!layout.num_tokens_per_rank.defined() && !layout.is_token_in_rank.defined() &&
              !layout.num_tokens_per_expert.defined(),
          "num_experts is {}, it must not be given together with layout", args.num_experts);
  require(args.topk_idx.defined(), "num_experts is {}, which needs topk_idx", args.num_experts);
}

plan::RoutingShape validate_topk_idx(const TensorView& topk_idx, int num_experts, int num_ranks,
                                     Device device) {
  expect(topk_idx, {"topk_idx", device, {DType::kInt32, DType::kInt64}, {-1, -1}});
  plan::RoutingShape shape;
  shape.num_tokens = topk_idx.shape[0];
  require(topk_idx.shape[1] >= 1 && topk_idx.shape[1] <= INT32_MAX,
          "topk_idx is {}, it needs at least one column", topk_idx);
  shape.num_topk = static_cast<int>(topk_idx.shape[1]);
  shape.num_experts = num_experts;
  shape.num_ranks = num_ranks;
  plan::validate(shape);
  return shape;
}

DispatchShape validate_payload(const DispatchArgs& args, int num_ranks, Device device) {
  validate(args.options);
  args.config.validate();
  require(args.expert_alignment >= 1, "expert_alignment is {}, must be at least 1",
          args.expert_alignment);
  require(args.num_worst_tokens >= 0 && args.num_worst_tokens <= INT32_MAX,
          "num_worst_tokens is {}, must be in [0, 2^31)", args.num_worst_tokens);
  expect_rows(args.x, {"x",
                       device,
                       {DType::kBfloat16, DType::kFloat16, DType::kFloat32, DType::kFloat8E4m3,
                        DType::kUint8},
                       {-1, -1}});
  expect_stats(args.dispatch_wait_recv_cost_stats, "dispatch_wait_recv_cost_stats", num_ranks,
               device);
  DispatchShape shape{};
  shape.record.scale_dtype = shape.record.topk_dtype = -1;
  shape.record.x_dtype = static_cast<std::int32_t>(args.x.dtype);
  shape.record.hidden = args.x.shape[1];
  shape.record.num_tokens = args.x.shape[0];
  shape.format.x_bytes = row_bytes(args.x);
  add_scales(args.x_scales, args.x.shape[0], device, shape);
  return shape;
}

DispatchShape validate_dispatch(const DispatchArgs& args, int num_ranks, Device device) {
  DispatchShape shape = validate_payload(args, num_ranks, device);
  shape.record.kind = args.prepared ? protocol::OpKind::kPreparedDispatch
                      : args.handle ? protocol::OpKind::kCachedDispatch
                                    : protocol::OpKind::kDispatch;
  require(!args.internode_handle, "internode_handle is given, but all ranks are of one node");
  if (args.prepared) {
    const IntranodeHandle& handle = args.prepared->handle;
    add_prepared(args, args.handle.has_value(), "handle", num_ranks, device, shape);
    expect_sends(handle, num_ranks, device);
    expect(handle.channel_prefix_matrix,
           {"handle.channel_prefix_matrix", device, {DType::kInt32}, {num_ranks, -1}});
    require(handle.channel_prefix_matrix.shape[1] >= 1,
            "handle.channel_prefix_matrix is {}, it needs at least one column",
            handle.channel_prefix_matrix);
    expect_tokens(handle, args.x);
  } else if (args.handle) {
    refuse_with_handle(args, "handle");
    expect_handle(*args.handle, num_ranks, device);
    expect_tokens(*args.handle, args.x);
  } else {
    add_routing(args, num_ranks, device, shape);
  }
  validate_groups(args, args.handle ? args.handle->recv_src_idx.shape[0] : -1, device);
  return shape;
}

void validate_prepare(const DispatchArgs& args) {
  require(!args.handle && !args.internode_handle,
          "handle is given, prepare_dispatch is for a dispatch without one");
  require(!args.prepared, "prepared is given, prepare_dispatch is what gives it");
  require(args.num_worst_tokens == 0,
          "num_worst_tokens is {}, it must be 0: prepare_dispatch waits for the counts",
          args.num_worst_tokens);
}

void validate_output(const char* name, const TensorView& output, const TensorView& like,
                     std::int64_t rows, Device device) {
  if (!output.defined()) return;
  require(like.defined(), "{} is given without the input that it is of", name);
  expect(output, {name, device, {like.dtype}, {-1, like.shape[1]}});
  require(output.shape[0] >= rows, "{} is {}, it needs at least {} rows", name, output, rows);
  constexpr std::uintptr_t kAlignment = 16;
  require(device.type == DeviceType::kHost ||
              reinterpret_cast<std::uintptr_t>(output.data) % kAlignment == 0,
          "{} begins at {}, on GPUs it must be a multiple of {} bytes", name, output.data,
          kAlignment);
}

protocol::CallRecord validate_combine(const CombineArgs& args, int num_ranks, Device device) {
  expect_rows(args.x,
              {"x", device, {DType::kBfloat16, DType::kFloat16, DType::kFloat32}, {-1, -1}});
  expect_handle(args.handle, num_ranks, device);
  const std::int64_t rows = validate_summands(args, args.handle.recv_src_idx.shape[0], device);
  return validate_sums(args, args.handle.is_token_in_rank.shape[0], rows, num_ranks, device);
}

std::int64_t validate_summands(const CombineArgs& args, std::int64_t handle_rows, Device device) {
  if (!args.groups) return args.x.shape[0];
  expect_groups(*args.groups, handle_rows, device);
  const std::int64_t grouped = args.groups->recv_rows.shape[0];
  require(args.x.shape[0] >= grouped, "x is {}, but groups.recv_rows has {} grouped rows", args.x,
          grouped);
  return handle_rows;
}

protocol::CallRecord validate_sums(const CombineArgs& args, std::int64_t tokens, std::int64_t rows,
                                   int num_ranks, Device device) {
  validate(args.options);
  args.config.validate();
  protocol::CallRecord record{};
  record.kind = protocol::OpKind::kCombine;
  record.x_dtype = static_cast<std::int32_t>(args.x.dtype);
  record.hidden = args.x.shape[1];
  record.scale_dtype = record.topk_dtype = -1;
  record.num_tokens = tokens;
  if (args.topk_weights.defined()) {
    expect(args.topk_weights, {"topk_weights", device, {DType::kFloat32}, {rows, -1}});
    require(args.topk_weights.shape[1] >= 1 && args.topk_weights.shape[1] <= INT32_MAX,
            "topk_weights is {}, it needs at least one column", args.topk_weights);
    record.has_topk_weights = 1;
    record.num_topk = static_cast<std::int32_t>(args.topk_weights.shape[1]);
  }
  for (const TensorView& bias : args.bias) {
    if (bias.defined()) expect(bias, {"bias", device, {args.x.dtype}, {tokens, args.x.shape[1]}});
  }
  expect_stats(args.combine_wait_recv_cost_stats, "combine_wait_recv_cost_stats", num_ranks,
               device);
  return record;
}

}  // namespace deep_ep
