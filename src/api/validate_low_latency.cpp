#include "api/validate_low_latency.hpp"

#include <algorithm>

#include "api/expect.hpp"
#include "api/validate.hpp"
#include "base/error.hpp"
#include "plan/numerics.hpp"

namespace deep_ep {

namespace {

using internode_ll::Quantization;

constexpr std::int64_t kScalesPerWord = 4;  // packed exponent bytes

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void check_max_tokens(std::int64_t max_tokens, int num_ranks) {
  require(max_tokens >= 1 && max_tokens <= INT32_MAX / num_ranks,
          "num_max_dispatch_tokens_per_rank is {}, must be in [1, {}] for {} ranks", max_tokens,
          INT32_MAX / num_ranks, num_ranks);
}

/// What both calls say about their tokens.
plan::LowLatencyShape check_routing(const TensorView& topk_idx, std::int64_t max_tokens,
                                    int num_experts, int num_ranks, Device device,
                                    protocol::CallRecord& record) {
  const plan::RoutingShape routing = validate_topk_idx(topk_idx, num_experts, num_ranks, device);
  check_max_tokens(max_tokens, num_ranks);
  require(routing.num_tokens <= max_tokens,
          "topk_idx is {}, num_max_dispatch_tokens_per_rank is {}: a rank may have so many tokens "
          "at most",
          topk_idx, max_tokens);
  record.scale_dtype = -1;
  record.num_topk = routing.num_topk;
  record.topk_dtype = static_cast<std::int32_t>(topk_idx.dtype);
  record.num_experts = num_experts;
  record.max_tokens = max_tokens;
  record.num_tokens = routing.num_tokens;
  plan::LowLatencyShape shape;
  shape.num_ranks = num_ranks;
  shape.num_experts = num_experts;
  shape.num_topk = routing.num_topk;
  shape.max_tokens = max_tokens;
  return shape;
}

void check_hook(bool return_recv_hook, const CallOptions& options) {
  validate(options);
  require(!return_recv_hook || (!options.async_finish && !options.previous_event),
          "return_recv_hook is true, which excludes async_finish and previous_event");
}

void choose_quantization(const LowLatencyDispatchArgs& args, LowLatencyDispatchShape& shape) {
  shape.row_dtype = args.x.dtype;
  if (args.x_scales.defined()) {
    require(args.x.dtype == DType::kFloat8E4m3 || args.x.dtype == DType::kUint8,
            "x is {}: scales go with float8_e4m3 or bytes", args.x);
    expect(args.x_scales, {"x_scales",
                           args.x.device,
                           {DType::kFloat32, DType::kInt32},
                           {args.x.shape[0], -1},
                           false});
    shape.scale_dtype = args.x_scales.dtype;
    shape.num_scales = static_cast<int>(args.x_scales.shape[1]);
  }
  require(!args.use_fp8 || (args.x.dtype != DType::kFloat16 && args.x.dtype != DType::kFloat32),
          "x is {}: use_fp8 quantises bfloat16 alone, without it other rows go as they are",
          args.x);
  if (args.x.dtype != DType::kBfloat16 || !args.use_fp8) return;
  const std::int64_t hidden = args.x.shape[1];
  require(hidden % plan::kFp8Group == 0, "x is {}: with use_fp8 hidden must be a multiple of {}",
          args.x, plan::kFp8Group);
  require(!args.use_ue8m0 || args.round_scale, "use_ue8m0 is true, which needs round_scale");
  shape.row_dtype = DType::kFloat8E4m3;
  shape.num_scales = static_cast<int>(hidden / plan::kFp8Group);
  shape.quantization = args.round_scale ? Quantization::kFp8PowerOfTwo : Quantization::kFp8;
  if (!args.use_ue8m0) return;
  shape.quantization = Quantization::kFp8Ue8m0;
  shape.scale_dtype = DType::kInt32;
  shape.num_scales = static_cast<int>(divide_up(shape.num_scales, kScalesPerWord));
}

plan::WireFormat wire_of(const LowLatencyCombineArgs& args) {
  if (!args.use_logfmt && !args.use_fp8) return plan::WireFormat::kBfloat16;
  require(!args.use_logfmt || !args.use_fp8,
          "use_logfmt and use_fp8 are true, one of them is allowed");
  require(args.handle.hidden % plan::kWireGroup == 0,
          "handle.hidden is {}: with {} it must be a multiple of {}", args.handle.hidden,
          args.use_logfmt ? "use_logfmt" : "use_fp8", plan::kWireGroup);
  return args.use_logfmt ? plan::WireFormat::kLogFmt : plan::WireFormat::kFp8;
}

/// `given`, checked, or what is to be allocated.
TensorView output(const TensorView& given, const char* name, DType dtype,
                  std::initializer_list<std::int64_t> shape, Device device) {
  if (!given.defined()) return {nullptr, dtype, shape, device};
  expect(given, {name, device, {dtype}, shape});
  return given;
}

}  // namespace

LowLatencyDispatchShape validate_dispatch(const LowLatencyDispatchArgs& args, int num_ranks,
                                          Device device) {
  check_hook(args.return_recv_hook, args.options);
  expect_rows(args.x, {"x",
                       device,
                       {DType::kBfloat16, DType::kFloat16, DType::kFloat32, DType::kFloat8E4m3,
                        DType::kUint8},
                       {-1, -1}});
  LowLatencyDispatchShape shape;
  shape.record.kind = protocol::OpKind::kLowLatencyDispatch;
  shape.shape = check_routing(args.topk_idx, args.num_max_dispatch_tokens_per_rank,
                              args.num_experts, num_ranks, device, shape.record);
  const std::int64_t tokens = args.topk_idx.shape[0];
  require(args.x.shape[0] == tokens, "x is {}, but topk_idx is {}", args.x, args.topk_idx);
  choose_quantization(args, shape);
  shape.shape.row_bytes = args.x.shape[1] * static_cast<std::int64_t>(size_of(shape.row_dtype)) +
                          std::int64_t{4} * shape.num_scales;
  shape.record.x_dtype = static_cast<std::int32_t>(shape.row_dtype);
  shape.record.hidden = args.x.shape[1];
  shape.record.num_scales = shape.num_scales;
  if (shape.num_scales > 0) shape.record.scale_dtype = static_cast<std::int32_t>(shape.scale_dtype);
  shape.record.rank_major = args.format == LowLatencyFormat::kRankMajor ? 1 : 0;
  if (args.topk_weights.defined()) {
    expect(args.topk_weights,
           {"topk_weights", device, {DType::kFloat32}, {tokens, args.topk_idx.shape[1]}});
    shape.record.has_topk_weights = 1;
  }
  const int local_experts = args.num_experts / num_ranks;
  if (args.cumulative_local_expert_recv_stats.defined()) {
    expect(args.cumulative_local_expert_recv_stats,
           {"cumulative_local_expert_recv_stats", device, {DType::kInt32}, {local_experts}});
  }
  if (args.dispatch_wait_recv_cost_stats.defined()) {
    expect(args.dispatch_wait_recv_cost_stats,
           {"dispatch_wait_recv_cost_stats", device, {DType::kInt64}, {num_ranks}});
  }
  return shape;
}

LowLatencyOutputViews validate_outputs(const LowLatencyDispatchArgs& args,
                                       const LowLatencyDispatchShape& shape, Device device) {
  const std::int64_t ranks = shape.shape.num_ranks;
  const std::int64_t max_tokens = shape.shape.max_tokens;
  const std::int64_t hidden = args.x.shape[1];
  const std::int64_t topk = args.topk_idx.shape[1];
  const bool rank_major = args.format == LowLatencyFormat::kRankMajor;
  const std::int64_t groups = rank_major ? ranks : shape.shape.num_local_experts();
  const std::int64_t rows = rank_major ? max_tokens : ranks * max_tokens;
  const LowLatencyOutputs& given = args.outputs;
  LowLatencyOutputViews views;
  views.recv_x = output(given.recv_x, "recv_x", shape.row_dtype, {groups, rows, hidden}, device);
  views.recv_count = output(given.recv_count, "recv_count", DType::kInt32, {groups}, device);
  views.src_info = output(given.src_info, "src_info", DType::kInt32, {groups, rows}, device);
  views.layout_range = output(given.layout_range, "layout_range", DType::kInt64,
                              {rank_major ? 1 : groups, ranks}, device);
  if (shape.num_scales > 0) {
    const std::int64_t scales = shape.num_scales;
    if (given.recv_x_scales.defined()) {
      expect(given.recv_x_scales,
             {"recv_x_scales", device, {shape.scale_dtype}, {groups, rows, scales}, false});
      views.recv_x_scales = given.recv_x_scales;
    } else {
      views.recv_x_scales = {nullptr, shape.scale_dtype, {groups, rows, scales}, device};
      views.recv_x_scales.strides = {rank_major ? rows : scales * rows, 1,
                                     rank_major ? groups * rows : rows};
    }
  }
  if (!rank_major) return views;
  views.recv_topk_idx = output(given.recv_topk_idx, "recv_topk_idx", args.topk_idx.dtype,
                               {groups, rows, topk}, device);
  if (args.topk_weights.defined()) {
    views.recv_topk_weights = output(given.recv_topk_weights, "recv_topk_weights", DType::kFloat32,
                                     {groups, rows, topk}, device);
  }
  return views;
}

LowLatencyCombineShape validate_combine(const LowLatencyCombineArgs& args, int num_ranks,
                                        Device device) {
  check_hook(args.return_recv_hook, args.options);
  const LowLatencyHandle& handle = args.handle;
  LowLatencyCombineShape shape;
  shape.record.kind = protocol::OpKind::kLowLatencyCombine;
  shape.shape = check_routing(args.topk_idx, handle.num_max_dispatch_tokens_per_rank,
                              handle.num_experts, num_ranks, device, shape.record);
  const std::int64_t ranks = num_ranks;
  const std::int64_t max_tokens = shape.shape.max_tokens;
  const bool rank_major = handle.format == LowLatencyFormat::kRankMajor;
  const std::int64_t groups = rank_major ? ranks : shape.shape.num_local_experts();
  const std::int64_t rows = rank_major ? max_tokens : ranks * max_tokens;
  require(handle.hidden > 0 && handle.hidden % 8 == 0,
          "handle.hidden is {}: rows of bfloat16 must have a positive multiple of 16 bytes",
          handle.hidden);
  expect(args.x, {"x", device, {DType::kBfloat16}, {groups, rows, handle.hidden}});
  expect(handle.src_info, {"handle.src_info", device, {DType::kInt32}, {groups, rows}});
  expect(handle.layout_range,
         {"handle.layout_range", device, {DType::kInt64}, {rank_major ? 1 : groups, ranks}});
  const std::int64_t tokens = args.topk_idx.shape[0];
  if (!rank_major || args.topk_weights.defined()) {
    expect(args.topk_weights,
           {"topk_weights", device, {DType::kFloat32}, {tokens, args.topk_idx.shape[1]}});
  }
  if (args.out.defined())
    expect(args.out, {"out", device, {DType::kBfloat16}, {tokens, handle.hidden}});
  if (args.combine_wait_recv_cost_stats.defined()) {
    expect(args.combine_wait_recv_cost_stats,
           {"combine_wait_recv_cost_stats", device, {DType::kInt64}, {num_ranks}});
  }
  shape.wire = wire_of(args);
  shape.shape.row_bytes = plan::wire_row_bytes(shape.wire, handle.hidden);
  shape.record.x_dtype = static_cast<std::int32_t>(DType::kBfloat16);
  shape.record.hidden = handle.hidden;
  shape.record.rank_major = rank_major ? 1 : 0;
  shape.record.wire_format = static_cast<std::int32_t>(shape.wire);
  return shape;
}

plan::LowLatencyShape low_latency_combine_shape(std::int64_t max_tokens, std::int64_t hidden,
                                                int num_ranks, int num_experts, int num_topk) {
  plan::LowLatencyShape shape;
  shape.num_ranks = num_ranks;
  shape.num_experts = num_experts;
  shape.num_topk = num_topk;
  shape.max_tokens = max_tokens;
  shape.row_bytes = 2 * hidden;
  return shape;
}

plan::LowLatencyShape low_latency_dispatch_shape(std::int64_t max_tokens, std::int64_t hidden,
                                                 int num_ranks, int num_experts, int num_topk) {
  plan::LowLatencyShape shape =
      low_latency_combine_shape(max_tokens, hidden, num_ranks, num_experts, num_topk);
  // bfloat16, or FP8 or bytes with a scale for each group.
  shape.row_bytes = std::max(2 * hidden, hidden + 4 * divide_up(hidden, plan::kFp8Group));
  return shape;
}

}  // namespace deep_ep
