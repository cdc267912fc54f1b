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
    job->layout = allocate_layout(args.topk_idx, args.num_experts, job->args.layout);
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

  const int channels = num_channels(args.config);
  IntranodeHandle& handle = job->result.handle;
  handle.rank_prefix_matrix = backend_->allocate(DType::kInt32, {num_ranks, num_ranks});
  handle.channel_prefix_matrix = backend_->allocate(DType::kInt32, {num_ranks, channels});
  handle.recv_channel_prefix_matrix = backend_->allocate(DType::kInt32, {num_ranks, channels});
  handle.is_token_in_rank = args.layout.is_token_in_rank;
  handle.send_head = backend_->allocate(DType::kInt32, {shape.record.num_tokens, num_ranks});
  job->tokens_per_expert.resize(shape.record.num_experts / num_ranks);

  intranode::NotifyDispatchParams& notify = job->notify;
  notify.call = call;
  notify.num_tokens_per_rank = args.layout.num_tokens_per_rank.as<const std::int32_t>();
  notify.num_tokens_per_expert = args.layout.num_tokens_per_expert.as<const std::int32_t>();
  notify.is_token_in_rank = args.layout.is_token_in_rank.as<const bool>();
  notify.topk_idx = args.topk_idx;
  notify.num_channels = channels;
  notify.rank_prefix_matrix = handle.rank_prefix_matrix.as<std::int32_t>();
  notify.channel_prefix_matrix = handle.channel_prefix_matrix.as<std::int32_t>();
  notify.send_head = handle.send_head.as<std::int32_t>();
  notify.recv_tokens_per_expert = job->tokens_per_expert.data();

  dispatch.rank_prefix_matrix = notify.rank_prefix_matrix;
  dispatch.send_head = notify.send_head;
  dispatch.num_channels = channels;
  dispatch.recv_channel_prefix_matrix = handle.recv_channel_prefix_matrix.as<std::int32_t>();
  return job;
}

void Buffer::Impl::allocate_results(DispatchJob& job, std::int64_t rows) {
  const plan::RowFormat& format = job.dispatch.format;
  const DispatchArgs& args = job.args;
  DispatchResult& result = job.result;
  job.block = backend_->allocate_results(plan::RecvArrays::bytes(format, rows));
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
  if (!job.dispatch.cached) {
    // A copy of its own: a handle outlives recv_x and must not keep that block.
    result.handle.recv_src_idx = backend_->allocate(DType::kInt32, {rows});
    job.dispatch.recv_src_idx = result.handle.recv_src_idx.as<std::int32_t>();
  }
  job.dispatch.block = job.block.block;
  job.dispatch.block_rows = rows;
}

void Buffer::Impl::notify(DispatchJob& job) {
  if (job.layout) internode::get_dispatch_layout(*backend_, *job.layout);
  intranode::notify_dispatch(*backend_, job.notify);
  const std::int64_t rows =
      plan::received_rows(job.notify.rank_prefix_matrix, bootstrap_->rank(), bootstrap_->size());
  if (job.args.num_worst_tokens == 0 || rows <= job.args.num_worst_tokens) return;
  throw Error(ErrorCode::kCapacity,
              fmt::format("intranode_dispatch: rank {} receives {} rows, num_worst_tokens is {}",
                          bootstrap_->rank(), rows, job.args.num_worst_tokens),
              {bootstrap_->rank()});
}

DispatchResult Buffer::Impl::intranode_dispatch(const DispatchArgs& args) {
  return collective("intranode_dispatch", [&] {
    const std::shared_ptr<DispatchJob> job = prepare_dispatch(args);
    const int rank = bootstrap_->rank();
    const int num_ranks = bootstrap_->size();
    const bool counted = !job->dispatch.cached && args.num_worst_tokens == 0;
    DispatchResult& result = job->result;
    if (counted) {
      // The counts are needed here and now: how many rows there will be.
      CallOptions now = args.options;
      now.async_finish = false;
      backend_->submit(now, stage(job->number, false, [this, job] { notify(*job); }));
      result.num_recv_tokens = plan::received_rows(job->notify.rank_prefix_matrix, rank, num_ranks);
      for (const std::int64_t count : job->tokens_per_expert) {
        result.num_recv_tokens_per_expert_list.push_back(
            plan::aligned_expert_count(count, args.expert_alignment));
      }
    } else if (job->dispatch.cached) {
      result.num_recv_tokens = args.handle->recv_src_idx.shape[0];
    } else {
      result.num_recv_tokens = -1;
    }
    allocate_results(
        *job, counted || job->dispatch.cached ? result.num_recv_tokens : args.num_worst_tokens);
    result.event = backend_->submit(args.options, stage(job->number, true, [this, job, counted] {
                                      intranode::DispatchParams& params = job->dispatch;
                                      if (params.cached) {
                                        params.call.record.routing_hash = backend_->routing_hash(
                                            job->args.handle->rank_prefix_matrix);
                                      } else if (!counted) {
                                        notify(*job);
                                      }
                                      intranode::dispatch(*backend_, params);
                                    }));
    return result;
  });
}

}  // namespace deep_ep
