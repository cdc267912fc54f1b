#include "api/dispatch_job.hpp"
#include "api/validate.hpp"
#include "base/error.hpp"
#include "plan/layout.hpp"

namespace deep_ep {

struct Buffer::Impl::InternodeCombineJob {
  CombineArgs args;
  internode::CombineParams params;
  CombineResult result;
};

namespace {

/// The handle's tensors as the steps take them; those that are not there yet are null.
internode::Routing routing_of(const InternodeHandle& handle) {
  internode::Routing routing;
  routing.num_channels = static_cast<int>(handle.gbl_channel_prefix_matrix.shape[1]);
  routing.is_token_in_rank = handle.is_token_in_rank.as<const bool>();
  routing.rdma_channel_prefix_matrix = handle.rdma_channel_prefix_matrix.as<std::int32_t>();
  routing.gbl_channel_prefix_matrix = handle.gbl_channel_prefix_matrix.as<std::int32_t>();
  routing.recv_rdma_channel_prefix_matrix =
      handle.recv_rdma_channel_prefix_matrix.as<std::int32_t>();
  routing.recv_rdma_rank_prefix_sum = handle.recv_rdma_rank_prefix_sum.as<std::int32_t>();
  routing.recv_gbl_channel_prefix_matrix = handle.recv_gbl_channel_prefix_matrix.as<std::int32_t>();
  routing.recv_gbl_rank_prefix_sum = handle.recv_gbl_rank_prefix_sum.as<std::int32_t>();
  routing.recv_src_meta = handle.recv_src_meta.as<plan::SourceMeta>();
  routing.send_rdma_head = handle.send_rdma_head.as<std::int32_t>();
  routing.send_nvl_head = handle.send_nvl_head.as<std::int32_t>();
  routing.nvl_head_rows = handle.send_nvl_head.shape[0];
  return routing;
}

}  // namespace

std::shared_ptr<Buffer::Impl::InternodeDispatchJob> Buffer::Impl::make_internode_dispatch(
    const DispatchArgs& given) {
  auto job = std::make_shared<InternodeDispatchJob>();
  job->args = given;
  const DispatchArgs& args = job->args;
  if (args.num_experts != 0) {
    validate_num_experts(args);
    job->layout = allocate_layout(args.topk_idx, args.num_experts, args.options, job->args.layout);
  }
  const DispatchShape shape = validate_internode_dispatch(args, topology_, options_.device);
  internode::DispatchParams& dispatch = job->dispatch;
  dispatch.call = make_call("internode_dispatch", args.config);
  dispatch.call.record = shape.record;
  job->number = log_.begin(dispatch.call.operation, epoch_, shape.record);
  dispatch.cached = args.internode_handle.has_value();
  dispatch.format = shape.format;
  dispatch.source = {args.x.as<const std::byte>(), args.x_scales, args.topk_idx,
                     args.topk_weights.as<const float>()};
  dispatch.wait_stats = args.dispatch_wait_recv_cost_stats.as<std::int64_t>();
  dispatch.chunk_rows = args.config.num_max_rdma_chunked_send_tokens;
  dispatch.window_rows = args.config.num_max_rdma_chunked_recv_tokens;
  if (dispatch.cached) {
    dispatch.routing = routing_of(*args.internode_handle);
    dispatch.num_channels = dispatch.routing.num_channels;
  } else {
    make_internode_notify(*job);
  }
  return job;
}

/// What a dispatch has to find out that has no handle.
void Buffer::Impl::make_internode_notify(InternodeDispatchJob& job) {
  const DispatchArgs& args = job.args;
  const protocol::CallRecord& record = job.dispatch.call.record;
  const int channels = num_channels(args.config);
  const int nodes = topology_.num_nodes();
  const int ranks = topology_.num_ranks;
  const auto int32 = [&](std::initializer_list<std::int64_t> shape) {
    return TensorView(nullptr, DType::kInt32, shape, options_.device);
  };
  const std::vector<Tensor> made = allocate(
      {int32({nodes, channels}), int32({ranks, channels}), int32({nodes, channels}), int32({nodes}),
       int32({ranks, channels}), int32({ranks}), int32({record.num_tokens, nodes})},
      args.options);
  InternodeHandle& handle = job.result.internode_handle;
  handle.is_token_in_rank = args.layout.is_token_in_rank;
  handle.rdma_channel_prefix_matrix = made[0];
  handle.gbl_channel_prefix_matrix = made[1];
  handle.recv_rdma_channel_prefix_matrix = made[2];
  handle.recv_rdma_rank_prefix_sum = made[3];
  handle.recv_gbl_channel_prefix_matrix = made[4];
  handle.recv_gbl_rank_prefix_sum = made[5];
  handle.send_rdma_head = made[6];
  job.tokens_per_expert.resize(record.num_experts / ranks);

  internode::NotifyDispatchParams& notify = job.notify;
  notify.call = job.dispatch.call;
  notify.num_tokens_per_rank = args.layout.num_tokens_per_rank.as<const std::int32_t>();
  notify.num_tokens_per_expert = args.layout.num_tokens_per_expert.as<const std::int32_t>();
  notify.topk_idx = args.topk_idx;
  notify.routing = routing_of(handle);
  notify.max_rows = args.num_worst_tokens;
  if (args.num_worst_tokens == 0) {
    notify.num_recv_rows = &job.num_recv_rows;
    notify.num_recv_records = &job.num_recv_records;
    notify.recv_tokens_per_expert = job.tokens_per_expert.data();
  }
  job.dispatch.routing = notify.routing;
  job.dispatch.num_channels = channels;
}

void Buffer::Impl::place_internode_handle(InternodeDispatchJob& job, std::int64_t rows,
                                          std::int64_t records) {
  const std::vector<Tensor> made =
      allocate({{nullptr,
                 DType::kUint8,
                 {rows, static_cast<std::int64_t>(internode::get_source_meta_bytes())},
                 options_.device},
                {nullptr, DType::kInt32, {records, topology_.ranks_per_node}, options_.device}},
               job.args.options);
  InternodeHandle& handle = job.result.internode_handle;
  handle.recv_src_meta = made[0];
  handle.send_nvl_head = made[1];
  job.dispatch.routing = routing_of(handle);
}

void Buffer::Impl::internode_notify(InternodeDispatchJob& job) {
  if (job.layout) internode::get_dispatch_layout(*backend_, *job.layout);
  internode::notify_dispatch(*backend_, job.notify);
}

void Buffer::Impl::find_internode_counts(const std::shared_ptr<InternodeDispatchJob>& job) {
  CallOptions now = job->args.options;
  now.async_finish = false;
  backend_->submit(now, stage(job->number, false, [this, job] { internode_notify(*job); }),
                   Backend::Part::kBegin);
  job->result.num_recv_tokens = job->num_recv_rows;
  for (const std::int64_t count : job->tokens_per_expert) {
    job->result.num_recv_tokens_per_expert_list.push_back(
        plan::aligned_expert_count(count, job->args.expert_alignment));
  }
}

DispatchResult Buffer::Impl::internode_dispatch(const DispatchArgs& args) {
  if (topology_.num_nodes() == 1) {
    throw Error(ErrorCode::kUnsupported,
                "internode_dispatch: all ranks are of one node, use dispatch or "
                "intranode_dispatch");
  }
  return collective("internode_dispatch", [&] {
    const std::shared_ptr<InternodeDispatchJob> job = make_internode_dispatch(args);
    DispatchResult& result = job->result;
    const bool counts_come_late = !job->dispatch.cached && args.num_worst_tokens > 0;
    std::int64_t rows = args.num_worst_tokens;
    std::int64_t records = args.num_worst_tokens;
    if (counts_come_late) {
      result.num_recv_tokens = -1;
    } else if (job->dispatch.cached) {
      rows = result.num_recv_tokens = args.internode_handle->recv_src_meta.shape[0];
    } else {
      find_internode_counts(job);
      rows = result.num_recv_tokens;
      records = job->num_recv_records;
    }
    place_results(*job, job->dispatch, rows);
    if (!job->dispatch.cached) place_internode_handle(*job, rows, records);
    const bool counted = !job->dispatch.cached && !counts_come_late;
    result.event = backend_->submit(
        args.options,
        stage(job->number, true,
              [this, job, counts_come_late] {
                if (counts_come_late) internode_notify(*job);
                internode::dispatch(*backend_, job->dispatch);
              }),
        counted && !options_.allocator ? Backend::Part::kEnd : Backend::Part::kWhole);
    return result;
  });
}

CombineResult Buffer::Impl::internode_combine(const CombineArgs& args) {
  if (topology_.num_nodes() == 1) {
    throw Error(ErrorCode::kUnsupported,
                "internode_combine: all ranks are of one node, use combine or intranode_combine");
  }
  return collective("internode_combine", [&] {
    auto job = std::make_shared<InternodeCombineJob>();
    job->args = args;
    internode::CombineParams& params = job->params;
    params.call = make_call("internode_combine", args.config);
    params.call.record = validate_internode_combine(args, topology_, options_.device);
    const std::uint64_t number = log_.begin("internode_combine", epoch_, params.call.record);
    place_sums(args, params, job->result);
    params.routing = routing_of(args.internode_handle);
    params.handle_rows = args.internode_handle.recv_src_meta.shape[0];
    params.chunk_rows = args.config.num_max_rdma_chunked_send_tokens;
    params.window_rows = args.config.num_max_rdma_chunked_recv_tokens;
    params.nvl_window_rows = args.config.num_max_nvl_chunked_recv_tokens;
    job->result.event = backend_->submit(args.options, stage(number, true, [this, job] {
                                           internode::cached_notify(*backend_, job->params);
                                           internode::combine(*backend_, job->params);
                                         }));
    return job->result;
  });
}

}  // namespace deep_ep
