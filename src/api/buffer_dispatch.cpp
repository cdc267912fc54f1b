#include <algorithm>

#include "api/buffer_impl.hpp"
#include "api/validate.hpp"
#include "base/error.hpp"
#include "modes/internode.hpp"
#include "modes/intranode.hpp"
#include "plan/layout.hpp"
#include "plan/recv_arrays.hpp"

namespace deep_ep {

/// One dispatch from validation to its event: everything that its stages use, kept alive by them.
struct Buffer::Impl::DispatchJob {
  DispatchArgs args;
  std::uint64_t number = 0;                       // in the log
  std::optional<internode::LayoutParams> layout;  // if the call has to find it
  intranode::NotifyDispatchParams notify;
  intranode::DispatchParams dispatch;
  std::int64_t num_recv_rows = 0;
  std::vector<std::int64_t> tokens_per_expert;  // received, of the local experts
  Backend::Results block;
  DispatchResult result;
};

namespace {

// Far above half the SMs of any GPU; keeps the handle's matrices small for any num_sms.
constexpr int kMaxChannels = 1024;

int num_channels(const Config& config) { return std::clamp(config.num_sms / 2, 1, kMaxChannels); }

}  // namespace

std::shared_ptr<Buffer::Impl::DispatchJob> Buffer::Impl::prepare_dispatch(
    const DispatchArgs& given) {
  const int num_ranks = bootstrap_->size();
  auto job = std::make_shared<DispatchJob>();
  job->args = given;
  const DispatchArgs& args = job->args;
  if (args.num_experts != 0) {
    validate_num_experts(args);
    job->layout = allocate_layout(args.topk_idx, args.num_experts, args.options, job->args.layout);
  }
  const DispatchShape shape = validate_dispatch(args, num_ranks, options_.device);
  Call call = make_call("intranode_dispatch", args.config);
  call.record = shape.record;
  job->number = log_.begin(call.operation, epoch_, call.record);

  intranode::DispatchParams& dispatch = job->dispatch;
  dispatch.call = call;
  dispatch.cached = args.handle.has_value();
  dispatch.format = shape.format;
  dispatch.source = {args.x.as<const std::byte>(), args.x_scales, args.topk_idx,
                     args.topk_weights.as<const float>()};
  dispatch.wait_stats = args.dispatch_wait_recv_cost_stats.as<std::int64_t>();
  if (dispatch.cached) {
    dispatch.rank_prefix_matrix = args.handle->rank_prefix_matrix.as<const std::int32_t>();
    dispatch.send_head = args.handle->send_head.as<const std::int32_t>();
    return job;
  }

  prepare_notify(*job);
  return job;
}

/// What a dispatch has to find out that has no handle.
void Buffer::Impl::prepare_notify(DispatchJob& job) {
  const DispatchArgs& args = job.args;
  const int num_ranks = bootstrap_->size();
  const int channels = num_channels(args.config);
  const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
    return TensorView(nullptr, DType::kInt32, {rows, columns}, options_.device);
  };
  const std::vector<Tensor> made =
      allocate({matrix(num_ranks, num_ranks), matrix(num_ranks, channels),
                matrix(job.dispatch.call.record.num_tokens, num_ranks)},
               args.options);
  IntranodeHandle& handle = job.result.handle;
  handle.rank_prefix_matrix = made[0];
  handle.channel_prefix_matrix = made[1];
  handle.is_token_in_rank = args.layout.is_token_in_rank;
  handle.send_head = made[2];
  job.tokens_per_expert.resize(job.dispatch.call.record.num_experts / num_ranks);

  intranode::NotifyDispatchParams& notify = job.notify;
  notify.call = job.dispatch.call;
  notify.num_tokens_per_rank = args.layout.num_tokens_per_rank.as<const std::int32_t>();
  notify.num_tokens_per_expert = args.layout.num_tokens_per_expert.as<const std::int32_t>();
  notify.is_token_in_rank = args.layout.is_token_in_rank.as<const bool>();
  notify.topk_idx = args.topk_idx;
  notify.num_channels = channels;
  notify.rank_prefix_matrix = handle.rank_prefix_matrix.as<std::int32_t>();
  notify.channel_prefix_matrix = handle.channel_prefix_matrix.as<std::int32_t>();
  notify.send_head = handle.send_head.as<std::int32_t>();
  notify.max_rows = args.num_worst_tokens;
  if (args.num_worst_tokens == 0) {
    notify.num_recv_rows = &job.num_recv_rows;
    notify.recv_tokens_per_expert = job.tokens_per_expert.data();
  }

  intranode::DispatchParams& dispatch = job.dispatch;
  dispatch.rank_prefix_matrix = notify.rank_prefix_matrix;
  dispatch.send_head = notify.send_head;
  dispatch.num_channels = channels;
}

void Buffer::Impl::place_results(DispatchJob& job, std::int64_t rows) {
  const plan::RowFormat& format = job.dispatch.format;
  const DispatchArgs& args = job.args;
  DispatchResult& result = job.result;
  job.block = allocate_results(plan::RecvArrays::bytes(format, rows), args.options);
  Carver carver(job.block.data);
  const plan::RecvArrays arrays = plan::RecvArrays::carve(carver, format, rows);
  const auto view = [&](const std::byte* data, const TensorView& like) {
    return Tensor(TensorView(data, like.dtype, {rows, like.shape[1]}, options_.device),
                  job.block.owner);
  };
  result.recv_x = view(arrays.x, args.x);
  if (args.x_scales.defined()) result.recv_x_scales = view(arrays.scales, args.x_scales);
  if (args.topk_idx.defined()) result.recv_topk_idx = view(arrays.topk_idx, args.topk_idx);
  if (args.topk_weights.defined()) {
    result.recv_topk_weights = view(arrays.topk_weights, args.topk_weights);
  }
  if (!job.dispatch.cached) place_handle(job, rows);
  job.dispatch.block = job.block.block;
  job.dispatch.block_rows = rows;
}

void Buffer::Impl::place_handle(DispatchJob& job, std::int64_t rows) {
  const int num_ranks = bootstrap_->size();
  const int channels = job.dispatch.num_channels;
  const Backend::Results block =
      allocate_results(plan::HandleArrays::bytes(rows, num_ranks, channels), job.args.options);
  Carver carver(block.data);
  const auto arrays = plan::HandleArrays::carve(carver, rows, num_ranks, channels);
  const auto view = [&](std::int32_t* data, std::initializer_list<std::int64_t> shape) {
    return Tensor(TensorView(data, DType::kInt32, shape, options_.device), block.owner);
  };
  IntranodeHandle& handle = job.result.handle;
  handle.recv_src_idx = view(arrays.recv_src_idx, {rows});
  handle.recv_channel_prefix_matrix =
      view(arrays.recv_channel_prefix_matrix, {num_ranks, channels});
  job.dispatch.handle_block = block.block;
  job.dispatch.recv_src_idx = arrays.recv_src_idx;
  job.dispatch.recv_channel_prefix_matrix = arrays.recv_channel_prefix_matrix;
}

void Buffer::Impl::notify(DispatchJob& job) {
  if (job.layout) internode::get_dispatch_layout(*backend_, *job.layout);
  intranode::notify_dispatch(*backend_, job.notify);
}

DispatchResult Buffer::Impl::intranode_dispatch(const DispatchArgs& args) {
  return collective("intranode_dispatch", [&] {
    const std::shared_ptr<DispatchJob> job = prepare_dispatch(args);
    const bool counted = !job->dispatch.cached && args.num_worst_tokens == 0;
    DispatchResult& result = job->result;
    if (counted) {
      // The counts are needed here and now: how many rows there will be.
      CallOptions now = args.options;
      now.async_finish = false;
      backend_->submit(now, stage(job->number, false, [this, job] { notify(*job); }),
                       Backend::Part::kBegin);
      result.num_recv_tokens = job->num_recv_rows;
      for (const std::int64_t count : job->tokens_per_expert) {
        result.num_recv_tokens_per_expert_list.push_back(
            plan::aligned_expert_count(count, args.expert_alignment));
      }
    } else if (job->dispatch.cached) {
      result.num_recv_tokens = args.handle->recv_src_idx.shape[0];
    } else {
      result.num_recv_tokens = -1;
    }
    place_results(*job,
                  counted || job->dispatch.cached ? result.num_recv_tokens : args.num_worst_tokens);
    result.event = backend_->submit(args.options,
                                    stage(job->number, true,
                                          [this, job, counted] {
                                            if (!counted && !job->dispatch.cached) notify(*job);
                                            intranode::dispatch(*backend_, job->dispatch);
                                          }),
                                    counted ? Backend::Part::kEnd : Backend::Part::kWhole);
    return result;
  });
}

}  // namespace deep_ep
