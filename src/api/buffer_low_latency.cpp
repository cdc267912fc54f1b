#include <algorithm>
#include <utility>

#include "api/buffer_impl.hpp"
#include "api/validate_low_latency.hpp"
#include "base/error.hpp"
#include "base/trace.hpp"
#include "modes/internode_ll.hpp"

namespace deep_ep {

using internode_ll::Phases;

/// One dispatch, kept alive by its hook.
struct Buffer::Impl::LowLatencyDispatchJob {
  explicit LowLatencyDispatchJob(const LowLatencyDispatchArgs& given) : args(given) {}

  LowLatencyDispatchArgs args;
  internode_ll::DispatchParams params;
  std::uint64_t number = 0;  // in the log
  Tensor ticket;
  LowLatencyDispatchResult result;
};

struct Buffer::Impl::LowLatencyCombineJob {
  explicit LowLatencyCombineJob(const LowLatencyCombineArgs& given) : args(given) {}

  LowLatencyCombineArgs args;
  internode_ll::CombineParams params;
  std::uint64_t number = 0;
  Tensor ticket;
  Tensor zero_copy;  // x, which the Buffer may replace by a larger one
  LowLatencyCombineResult result;
};

namespace {

void require_fit(const plan::LowLatencyShape& shape, plan::LowLatencyKind kind,
                 std::int64_t bytes) {
  if (plan::LowLatencyLayout::fits(shape, kind, bytes)) return;
  throw Error(ErrorCode::kCapacity,
              fmt::format("num_rdma_bytes is {}, this call needs {}: see "
                          "Buffer::get_low_latency_rdma_size_hint",
                          bytes, plan::LowLatencyLayout::bytes(shape, shape)));
}

TensorView ticket_view(Device device) { return {nullptr, DType::kInt64, {1}, device}; }

}  // namespace

void Buffer::Impl::require_low_latency(const char* operation) const {
  if (has_low_latency()) return;
  throw Error(ErrorCode::kUnsupported,
              fmt::format("{}: the {} ranks are of {} nodes, between which low latency needs a "
                          "Buffer that was made with low_latency_mode",
                          operation, topology_.num_ranks, topology_.num_nodes()));
}

void Buffer::Impl::refuse_third(const char* operation, const LowLatencyCalls& calls) {
  if (!calls.live[(calls.sent + 1) % 2]) return;
  throw Error(ErrorCode::kUsage,
              fmt::format("{}: call {} of this kind has not been received, its recv_hook must run "
                          "before call {} may be sent",
                          operation, calls.sent - 1, calls.sent + 1));
}

Call Buffer::Impl::low_latency_call(const char* operation, const LowLatencyCalls& calls,
                                    const protocol::CallRecord& record) const {
  Call call = make_call(operation, {});
  call.epoch = calls.sent;
  call.record = record;
  return call;
}

template <class Job>
EventHandle Buffer::Impl::submit_low_latency(LowLatencyCalls& calls,
                                             const std::shared_ptr<Job>& job,
                                             std::function<void()>& hook) {
  const auto step = [this, job](Phases phases) {
    job->params.phases = phases;
    if constexpr (std::is_same_v<Job, LowLatencyDispatchJob>) {
      internode_ll::dispatch(*backend_, job->params);
    } else {
      internode_ll::combine(*backend_, job->params);
    }
  };
  const CallOptions& options = job->args.options;
  if (!job->args.return_recv_hook) {
    job->params.stream = backend_->comm_stream();
    return backend_->submit(options,
                            stage(job->number, true, options, [step] { step(Phases::kBoth); }));
  }
  job->params.stream = options.stream;
  backend_->run(options, stage(job->number, false, {}, [step] { step(Phases::kSend); }));
  bool& live = calls.live[calls.sent % 2];
  live = true;
  hook = [self = self_, job, step, &live, done = std::make_shared<bool>(false)] {
    Impl* impl = *self;
    const char* operation = job->params.call.operation;
    if (impl == nullptr)
      throw Error(ErrorCode::kUsage, fmt::format("{}: the Buffer is destroyed", operation));
    const Usage usage(*impl, operation);
    if (std::exchange(*done, true))
      throw Error(ErrorCode::kUsage, fmt::format("{}: recv_hook has run already", operation));
    live = false;
    impl->check_fault(operation);
    impl->backend_->run(job->args.options,
                        impl->stage(job->number, true, {}, [step] { step(Phases::kReceive); }));
  };
  return EventHandle();
}

void Buffer::Impl::fill_params(LowLatencyDispatchJob& job, const LowLatencyDispatchShape& shape) {
  const LowLatencyDispatchArgs& args = job.args;
  const LowLatencyDispatchResult& result = job.result;
  internode_ll::DispatchParams& params = job.params;
  params.shape = shape.shape;
  params.rank_major = args.format == LowLatencyFormat::kRankMajor;
  params.topk_idx = args.topk_idx;
  params.ticket = job.ticket.as<std::uint64_t>();
  params.wait_stats = args.dispatch_wait_recv_cost_stats.as<std::int64_t>();
  params.quantization = shape.quantization;
  params.x = args.x.as<const std::byte>();
  params.hidden = args.x.shape[1];
  params.x_scales = args.x_scales;
  params.topk_weights = args.topk_weights.as<const float>();
  params.num_scales = shape.num_scales;
  params.x_bytes = shape.shape.row_bytes - std::int64_t{4} * shape.num_scales;
  params.recv_x = result.recv_x.as<std::byte>();
  params.recv_x_scales = result.recv_x_scales;
  params.recv_count = result.recv_count.as<std::int32_t>();
  params.recv_topk_idx = result.recv_topk_idx;
  params.recv_topk_weights = result.recv_topk_weights.as<float>();
  params.src_info = result.handle.src_info.as<std::int32_t>();
  params.layout_range = result.handle.layout_range.as<std::int64_t>();
  params.cumulative_stats = args.cumulative_local_expert_recv_stats.as<std::int32_t>();
}

LowLatencyDispatchResult Buffer::Impl::low_latency_dispatch(const LowLatencyDispatchArgs& args) {
  require_low_latency("low_latency_dispatch");
  constexpr const char* kOperation = "low_latency_dispatch";
  LowLatencyCalls& calls = low_latency_dispatches_;
  return low_latency(kOperation, calls, [&] {
    auto job = make_recycled<LowLatencyDispatchJob>(args);
    const LowLatencyDispatchShape shape =
        validate_dispatch(args, bootstrap_->size(), options_.device);
    require_fit(shape.shape, plan::LowLatencyKind::kDispatch, options_.num_rdma_bytes);
    const LowLatencyOutputViews views = validate_outputs(args, shape, options_.device);
    internode_ll::DispatchParams& params = job->params;
    params.call = low_latency_call(kOperation, calls, shape.record);
    job->number = log_.begin(kOperation, calls.sent, shape.record);

    LowLatencyDispatchResult& result = job->result;
    const std::pair<const TensorView*, Tensor*> outputs[] = {
        {&views.recv_x, &result.recv_x},
        {&views.recv_x_scales, &result.recv_x_scales},
        {&views.recv_count, &result.recv_count},
        {&views.recv_topk_idx, &result.recv_topk_idx},
        {&views.recv_topk_weights, &result.recv_topk_weights},
        {&views.src_info, &result.handle.src_info},
        {&views.layout_range, &result.handle.layout_range}};
    std::vector<TensorView> missing;
    missing.reserve(std::size(outputs) + 1);
    if (args.return_recv_hook) missing.push_back(ticket_view(options_.device));
    for (const auto& [view, tensor] : outputs) {
      if (view->defined() && view->data == nullptr) missing.push_back(*view);
    }
    std::vector<Tensor> made = allocate_private(std::move(missing), args.options);
    std::size_t next = 0;
    if (args.return_recv_hook) job->ticket = std::move(made[next++]);
    for (const auto& [view, tensor] : outputs) {
      if (view->defined())
        *tensor = view->data == nullptr ? std::move(made[next++]) : Tensor(*view);
    }
    result.handle.num_max_dispatch_tokens_per_rank = args.num_max_dispatch_tokens_per_rank;
    result.handle.hidden = args.x.shape[1];
    result.handle.num_experts = args.num_experts;
    result.handle.format = args.format;

    fill_params(*job, shape);
    std::function<void()> hook;
    result.event = submit_low_latency(calls, job, hook);
    LowLatencyDispatchResult returned = take_result(job);
    returned.recv_hook = std::move(hook);
    return returned;
  });
}

LowLatencyCombineResult Buffer::Impl::low_latency_combine(const LowLatencyCombineArgs& args) {
  require_low_latency("low_latency_combine");
  constexpr const char* kOperation = "low_latency_combine";
  LowLatencyCalls& calls = low_latency_combines_;
  return low_latency(kOperation, calls, [&] {
    auto job = make_recycled<LowLatencyCombineJob>(args);
    const LowLatencyCombineShape shape =
        validate_combine(args, bootstrap_->size(), options_.device);
    require_fit(shape.shape, plan::LowLatencyKind::kCombine, options_.num_rdma_bytes);
    if (args.zero_copy) job->zero_copy = zero_copy_rows(args.x, calls.sent);
    internode_ll::CombineParams& params = job->params;
    params.call = low_latency_call(kOperation, calls, shape.record);
    job->number = log_.begin(kOperation, calls.sent, shape.record);

    LowLatencyCombineResult& result = job->result;
    std::vector<TensorView> missing;
    if (args.return_recv_hook) missing.push_back(ticket_view(options_.device));
    if (!args.out.defined()) {
      missing.emplace_back(
          nullptr, DType::kBfloat16,
          std::initializer_list<std::int64_t>{args.topk_idx.shape[0], args.handle.hidden},
          options_.device);
    }
    const std::vector<Tensor> made = allocate_private(std::move(missing), args.options);
    if (args.return_recv_hook) job->ticket = made.front();
    result.combined_x = args.out.defined() ? Tensor(args.out) : made.back();

    params.shape = shape.shape;
    params.rank_major = args.handle.format == LowLatencyFormat::kRankMajor;
    params.topk_idx = args.topk_idx;
    params.ticket = job->ticket.as<std::uint64_t>();
    params.wait_stats = args.combine_wait_recv_cost_stats.as<std::int64_t>();
    params.x = args.zero_copy ? job->zero_copy.as<const std::byte>() : args.x.as<const std::byte>();
    params.wire = shape.wire;
    params.hidden = args.handle.hidden;
    params.topk_weights = params.rank_major ? nullptr : args.topk_weights.as<const float>();
    params.src_info = args.handle.src_info.as<const std::int32_t>();
    params.layout_range = args.handle.layout_range.as<const std::int64_t>();
    params.combined_x = result.combined_x.as<std::byte>();
    std::function<void()> hook;
    result.event = submit_low_latency(calls, job, hook);
    LowLatencyCombineResult returned = take_result(job);
    returned.recv_hook = std::move(hook);
    return returned;
  });
}

/// Where combine `number` finds its rows: in the view that was asked for, be it x or not.
const Tensor& Buffer::Impl::zero_copy_rows(const TensorView& x, std::uint64_t number) const {
  const Tensor& own = zero_copy_[number % 2];
  const bool is_view = own.defined() && x.data == own.data;
  require(is_view || (zero_copy_for_ == number && x.nbytes() <= own.nbytes()),
          "zero_copy is true, but get_next_low_latency_combine_buffer was not called for this "
          "combine, and x begins at {}, not where its view does, {}",
          x.data, own.data);
  return own;
}

Tensor Buffer::Impl::get_next_low_latency_combine_buffer(const LowLatencyHandle& handle) {
  const Usage usage(*this, "get_next_low_latency_combine_buffer");
  require(handle.src_info.defined() && handle.src_info.ndim == 2 && handle.hidden > 0,
          "handle is not of a low_latency_dispatch");
  const std::int64_t groups = handle.src_info.shape[0];
  const std::int64_t rows = handle.src_info.shape[1];
  zero_copy_for_ = low_latency_combines_.sent + 1;
  Tensor& buffer = zero_copy_[zero_copy_for_ % 2];
  const TensorView view(buffer.data, DType::kBfloat16, {groups, rows, handle.hidden},
                        options_.device);
  if (!buffer.defined() || buffer.nbytes() < view.nbytes()) {
    // The smaller one stays: a captured graph may read it.
    if (buffer.defined()) outgrown_zero_copy_.push_back(std::move(buffer));
    buffer = backend_->allocate_private({view}, backend_->comm_stream())[0];
  }
  TensorView shaped = view;
  shaped.data = buffer.data;
  return {shaped, buffer.owner()};
}

void Buffer::Impl::low_latency_mask(const char* operation, const std::function<void()>& body) {
  const Usage usage(*this, operation);
  check_fault(operation);
  require(options_.enable_shrink, "{}: masks need a Buffer with enable_shrink", operation);
  body();
}

LowLatencyDispatchResult Buffer::low_latency_dispatch(const LowLatencyDispatchArgs& args) {
  trace::step("Buffer::low_latency_dispatch");
  return impl_->low_latency_dispatch(args);
}
LowLatencyCombineResult Buffer::low_latency_combine(const LowLatencyCombineArgs& args) {
  trace::step("Buffer::low_latency_combine");
  return impl_->low_latency_combine(args);
}

Tensor Buffer::get_next_low_latency_combine_buffer(const LowLatencyHandle& handle) {
  return impl_->get_next_low_latency_combine_buffer(handle);
}

void Buffer::clean_low_latency_buffer(int num_max_dispatch_tokens_per_rank, std::int64_t hidden,
                                      int num_experts) {
  trace::step("Buffer::clean_low_latency_buffer");
  impl_->require_low_latency("clean_low_latency_buffer");
  constexpr int kTopk = 1;
  const int ranks = num_ranks();
  require(num_max_dispatch_tokens_per_rank >= 1 && hidden >= 1 && num_experts >= ranks &&
              num_experts % ranks == 0,
          "num_max_dispatch_tokens_per_rank is {}, hidden {}, num_experts {}: must be positive, "
          "num_experts a multiple of the {} ranks",
          num_max_dispatch_tokens_per_rank, hidden, num_experts, ranks);
  internode_ll::clean_low_latency_buffer(
      impl_->options_.num_rdma_bytes,
      low_latency_dispatch_shape(num_max_dispatch_tokens_per_rank, hidden, ranks, num_experts,
                                 kTopk),
      low_latency_combine_shape(num_max_dispatch_tokens_per_rank, hidden, ranks, num_experts,
                                kTopk));
  if (!impl_->options_.enable_shrink) return;
  // A call without tokens: who does not come is masked.
  LowLatencyDispatchArgs args;
  args.x = {nullptr, DType::kUint8, {0, 16}, device()};
  args.topk_idx = {nullptr, DType::kInt64, {0, kTopk}, device()};
  args.num_max_dispatch_tokens_per_rank = 1;
  args.num_experts = ranks;
  args.use_fp8 = false;
  impl_->low_latency_dispatch(args);
}

void Buffer::low_latency_update_mask_buffer(int rank, bool masked) {
  impl_->low_latency_mask("low_latency_update_mask_buffer", [&] {
    require(rank >= 0 && rank < num_ranks() && rank != this->rank(),
            "rank is {}, must be another rank of {}", rank, num_ranks());
    impl_->backend_->update_mask(rank, masked, impl_->backend_->comm_stream());
  });
}
void Buffer::low_latency_query_mask_buffer(const TensorView& mask, Stream stream) {
  impl_->low_latency_mask("low_latency_query_mask_buffer", [&] {
    require(mask.defined() && mask.dtype == DType::kInt32 && mask.ndim == 1 &&
                mask.shape[0] == num_ranks() && mask.is_contiguous() && mask.device == device(),
            "mask is {}, must be int32[{}] on the Buffer's device", mask.describe(), num_ranks());
    impl_->backend_->query_mask(mask.as<std::int32_t>(), stream);
  });
}
void Buffer::low_latency_clean_mask_buffer() {
  impl_->low_latency_mask("low_latency_clean_mask_buffer",
                          [&] { impl_->backend_->clean_mask(impl_->backend_->comm_stream()); });
}

std::int64_t Buffer::get_low_latency_rdma_size_hint(int num_max_dispatch_tokens_per_rank,
                                                    std::int64_t hidden, int num_ranks,
                                                    int num_experts, int num_topk) noexcept {
  const std::int64_t ranks = std::clamp(num_ranks, 1, 1 << 16);
  const std::int64_t tokens = std::clamp(num_max_dispatch_tokens_per_rank, 1, 1 << 24);
  const std::int64_t values = std::clamp<std::int64_t>(hidden, 1, std::int64_t{1} << 24);
  const auto experts = static_cast<int>(std::clamp<std::int64_t>(num_experts, ranks, 1 << 24));
  const int topk = std::clamp(num_topk, 1, 1 << 12);
  return plan::LowLatencyLayout::bytes(
      low_latency_dispatch_shape(tokens, values, static_cast<int>(ranks), experts, topk),
      low_latency_combine_shape(tokens, values, static_cast<int>(ranks), experts, topk));
}

}  // namespace deep_ep
