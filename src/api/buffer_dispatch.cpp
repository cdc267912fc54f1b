#include <algorithm>
#include <exception>
#include <utility>

#include "api/dispatch_job.hpp"
#include "api/validate.hpp"
#include "base/error.hpp"
#include "plan/layout.hpp"
#include "plan/recv_arrays.hpp"

namespace deep_ep {

namespace {

// Far above half the SMs of any GPU; keeps the handle's matrices small for any num_sms.
constexpr int kMaxChannels = 1024;

}  // namespace

int num_channels(const Config& config) { return std::clamp(config.num_sms / 2, 1, kMaxChannels); }

std::shared_ptr<Buffer::Impl::DispatchJob> Buffer::Impl::make_dispatch(const char* operation,
                                                                       const DispatchArgs& given) {
  const int num_ranks = bootstrap_->size();
  auto job = make_recycled<DispatchJob>(given);
  const DispatchArgs& args = job->args;
  if (args.num_experts != 0 && !args.prepared) {
    validate_num_experts(args);
    job->layout = allocate_layout(args.topk_idx, args.num_experts, args.options, job->args.layout);
  }
  const DispatchShape shape = validate_dispatch(args, num_ranks, options_.device);
  Call call = make_call(operation, args.config);
  call.record = shape.record;
  job->number = log_.begin(call.operation, epoch_, call.record);

  intranode::DispatchParams& dispatch = job->dispatch;
  dispatch.call = call;
  dispatch.cached = args.handle || args.prepared;
  dispatch.format = shape.format;
  dispatch.source = {args.x.as<const std::byte>(), args.x_scales, args.topk_idx,
                     args.topk_weights.as<const float>()};
  dispatch.wait_stats = args.dispatch_wait_recv_cost_stats.as<std::int64_t>();
  if (!dispatch.cached) {
    make_notify(*job);
    return job;
  }
  const IntranodeHandle& handle = args.prepared ? args.prepared->handle : *args.handle;
  dispatch.rank_prefix_matrix = handle.rank_prefix_matrix.as<const std::int32_t>();
  dispatch.send_head = handle.send_head.as<const std::int32_t>();
  if (args.prepared) {
    dispatch.num_channels = static_cast<int>(handle.channel_prefix_matrix.shape[1]);
    job->result.handle = handle;
  }
  return job;
}

/// What a dispatch has to find out that has no handle.
void Buffer::Impl::make_notify(DispatchJob& job) {
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
  notify.wait_stats = args.dispatch_wait_recv_cost_stats.as<std::int64_t>();
  if (args.num_worst_tokens == 0) {
    notify.num_recv_rows = &job.num_recv_rows;
    notify.recv_tokens_per_expert = job.tokens_per_expert.data();
  }

  intranode::DispatchParams& dispatch = job.dispatch;
  dispatch.rank_prefix_matrix = notify.rank_prefix_matrix;
  dispatch.send_head = notify.send_head;
  dispatch.num_channels = channels;
}

void Buffer::Impl::place_results(AnyDispatchJob& job, DispatchStep& dispatch, std::int64_t rows) {
  const DispatchArgs& args = job.args;
  DispatchResult& result = job.result;
  bool all_given = true;
  // What the caller brings is a result as it is; `copy_to` is then where its rows are copied to.
  const auto place = [&](const char* name, const TensorView& like, const TensorView& given,
                         std::byte*& copy_to, Tensor& to) {
    validate_output(name, given, like, rows, options_.device);
    if (!like.defined()) return;
    to = TensorView(given.data, like.dtype, {rows, like.shape[1]}, options_.device);
    copy_to = given.as<std::byte>();
    all_given = all_given && given.defined();
  };
  place("recv_x", args.x, args.recv_x, dispatch.outputs.x, result.recv_x);
  place("recv_x_scales", args.x_scales, args.recv_x_scales, dispatch.outputs.scales,
        result.recv_x_scales);
  place("recv_topk_idx", args.topk_idx, args.recv_topk_idx, dispatch.outputs.topk_idx,
        result.recv_topk_idx);
  place("recv_topk_weights", args.topk_weights, args.recv_topk_weights,
        dispatch.outputs.topk_weights, result.recv_topk_weights);
  std::byte* x = nullptr;  // if peers can write to the caller's memory
  if (args.recv_x.defined() && rows > 0) {
    dispatch.x_block = backend_->locate(args.recv_x.data, rows * dispatch.format.x_bytes);
    if (dispatch.x_block.segment >= 0) x = std::exchange(dispatch.outputs.x, nullptr);
  }
  // A block without views is read by nobody but this call.
  const std::int64_t bytes =
      plan::RecvArrays::bytes(x == nullptr ? dispatch.format : dispatch.format.without_x(), rows);
  job.block = all_given ? backend_->allocate_scratch(bytes, args.options.stream)
                        : allocate_results(bytes, args.options);
  Carver carver(job.block.data);
  const plan::RecvArrays arrays = plan::RecvArrays::carve(carver, dispatch.format, rows, x);
  const auto keep = [&](std::byte* data, const TensorView& given, Tensor& to) {
    if (!to.defined() || given.defined()) return;
    to.data = data;
    to = Tensor(to, job.block.owner);
  };
  keep(arrays.x, args.recv_x, result.recv_x);
  keep(arrays.scales, args.recv_x_scales, result.recv_x_scales);
  keep(arrays.topk_idx, args.recv_topk_idx, result.recv_topk_idx);
  keep(arrays.topk_weights, args.recv_topk_weights, result.recv_topk_weights);
  dispatch.block = job.block.block;
  dispatch.block_rows = rows;
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

void Buffer::Impl::submit_now(const AnyDispatchJob& job, Backend::Part part,
                              std::function<void()> work) {
  CallOptions now = job.args.options;
  now.async_finish = false;
  backend_->submit(now, stage(job.number, false, now, std::move(work)), part);
}

void Buffer::Impl::take_counts(AnyDispatchJob& job) {
  job.result.num_recv_tokens = job.num_recv_rows;
  for (const std::int64_t count : job.tokens_per_expert) {
    job.result.num_recv_tokens_per_expert_list.push_back(
        plan::aligned_expert_count(count, job.args.expert_alignment));
  }
}

void Buffer::Impl::await_counts(DispatchJob& job) {
  stage(job.number, false, {}, [this, &job] { backend_->await_counts(job.notify); })();
  take_counts(job);
}

bool Buffer::Impl::place_ahead(DispatchJob& job) {
  const DispatchArgs& args = job.args;
  const std::int64_t room =
      row_forecast_.room(job.dispatch.call.record.num_tokens, topology_.num_ranks);
  const bool brings_memory = args.recv_x.defined() || args.recv_x_scales.defined() ||
                             args.recv_topk_idx.defined() || args.recv_topk_weights.defined();
  if (!backend_->queues_steps() || room == 0 || brings_memory) return false;
  try {
    place_results(job, job.dispatch, room);
    place_handle(job, room);
  } catch (const std::exception&) {
    // Of whatever kind, since allocators are the caller's. For the rows that come there may be
    // memory; else it is thrown again.
    return false;
  }
  return true;
}

void Buffer::Impl::cut_results(DispatchJob& job, std::int64_t rows) {
  DispatchResult& result = job.result;
  for (Tensor* tensor : {&result.recv_x, &result.recv_x_scales, &result.recv_topk_idx,
                         &result.recv_topk_weights, &result.handle.recv_src_idx}) {
    if (tensor->defined()) tensor->shape[0] = rows;
  }
}

bool Buffer::Impl::find_counts(const std::shared_ptr<DispatchJob>& job) {
  const DispatchArgs& args = job->args;
  DispatchResult& result = job->result;
  if (args.handle) {
    result.num_recv_tokens = args.handle->recv_src_idx.shape[0];
  } else if (args.prepared) {
    result.num_recv_tokens = args.prepared->num_recv_tokens;
    result.num_recv_tokens_per_expert_list = args.prepared->num_recv_tokens_per_expert_list;
  } else if (args.num_worst_tokens > 0) {
    result.num_recv_tokens = -1;
  } else {
    submit_now(*job, Backend::Part::kBegin, [this, job] { notify(*job); });
    // While the host waited for the counts, and placed results by them, the device would be idle.
    job->dispatch.tentative = place_ahead(*job);
    if (job->dispatch.tentative) {
      submit_now(*job, Backend::Part::kBegin,
                 [this, job] { intranode::dispatch(*backend_, job->dispatch); });
    }
    await_counts(*job);
    const std::int64_t rows = result.num_recv_tokens;
    row_forecast_.learn(job->dispatch.call.record.num_tokens, rows);
    if (std::exchange(job->dispatch.tentative, false) && rows <= job->dispatch.block_rows) {
      cut_results(*job, rows);
      return true;
    }
  }
  return false;
}

PreparedDispatch Buffer::Impl::take_prepared(AnyDispatchJob& job,
                                             const protocol::CallRecord& record) {
  log_.finish(job.number, "done");
  PreparedDispatch prepared;
  prepared.num_recv_tokens = job.result.num_recv_tokens;
  prepared.num_recv_tokens_per_expert_list = std::move(job.result.num_recv_tokens_per_expert_list);
  prepared.num_experts = record.num_experts;
  prepared.expert_alignment = job.args.expert_alignment;
  return prepared;
}

PreparedDispatch Buffer::Impl::prepare_dispatch(const DispatchArgs& args) {
  return collective("prepare_dispatch", [&] {
    validate_prepare(args);
    return topology_.num_nodes() > 1 ? internode_prepare(args) : intranode_prepare(args);
  });
}

PreparedDispatch Buffer::Impl::intranode_prepare(const DispatchArgs& args) {
  const std::shared_ptr<DispatchJob> job = make_dispatch("prepare_dispatch", args);
  job->notify.call.record.kind = protocol::OpKind::kPrepareDispatch;
  submit_now(*job, Backend::Part::kWhole, [this, job] { notify(*job); });
  await_counts(*job);
  PreparedDispatch prepared = take_prepared(*job, job->notify.call.record);
  prepared.handle = job->result.handle;
  return prepared;
}

DispatchResult Buffer::Impl::intranode_dispatch(const DispatchArgs& args) {
  require_one_node("intranode_dispatch");
  return collective("intranode_dispatch", [&] {
    const std::shared_ptr<DispatchJob> job = make_dispatch("intranode_dispatch", args);
    DispatchResult& result = job->result;
    const bool queued = find_counts(job);
    const bool counts_come_late = !job->dispatch.cached && args.num_worst_tokens > 0;
    const std::int64_t rows = counts_come_late ? args.num_worst_tokens : result.num_recv_tokens;
    if (!queued) {
      place_results(*job, job->dispatch, rows);
      if (!args.handle) place_handle(*job, rows);
    }
    if (args.group_rows) {
      const IntranodeHandle& handle = args.handle ? *args.handle : result.handle;
      allocate_groups(*job, job->dispatch, rows, num_received_rows(handle, bootstrap_->rank()));
    }
    const bool counted = !job->dispatch.cached && !counts_come_late;
    result.event = backend_->submit(
        args.options,
        stage(job->number, true, args.options,
              [this, job, counts_come_late, queued] {
                if (counts_come_late) notify(*job);
                if (!queued) intranode::dispatch(*backend_, job->dispatch);
                if (job->args.group_rows) intranode::group_rows(*backend_, job->group);
              }),
        // Memory of a caller's allocator, the groups' too, may have been in use on the
        // caller's stream since the first part began.
        (queued && !args.group_rows) || (counted && !options_.allocator) ? Backend::Part::kEnd
                                                                         : Backend::Part::kWhole);
    return take_result(job);
  });
}

}  // namespace deep_ep
