#include "api/dispatch_job.hpp"
#include "api/validate.hpp"
#include "base/error.hpp"
#include "plan/layout.hpp"

namespace deep_ep {

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
    const char* operation, const DispatchArgs& given) {
  auto job = make_recycled<InternodeDispatchJob>(given);
  const DispatchArgs& args = job->args;
  if (args.num_experts != 0 && !args.prepared) {
    validate_num_experts(args);
    job->layout = allocate_layout(args.topk_idx, args.num_experts, args.options, job->args.layout);
  }
  const DispatchShape shape = validate_internode_dispatch(args, topology_, options_.device);
  internode::DispatchParams& dispatch = job->dispatch;
  dispatch.call = make_call(operation, args.config);
  dispatch.call.record = shape.record;
  job->number = log_.begin(dispatch.call.operation, epoch_, shape.record);
  dispatch.cached = args.internode_handle || args.prepared;
  dispatch.fill_handle = !args.internode_handle;
  dispatch.format = shape.format;
  dispatch.source = {args.x.as<const std::byte>(), args.x_scales, args.topk_idx,
                     args.topk_weights.as<const float>()};
  dispatch.wait_stats = args.dispatch_wait_recv_cost_stats.as<std::int64_t>();
  dispatch.chunk_rows = args.config.num_max_rdma_chunked_send_tokens;
  dispatch.window_rows = args.config.num_max_rdma_chunked_recv_tokens;
  if (!dispatch.cached) {
    make_internode_notify(*job);
    return job;
  }
  if (args.prepared) job->result.internode_handle = args.prepared->internode_handle;
  dispatch.routing =
      routing_of(args.prepared ? args.prepared->internode_handle : *args.internode_handle);
  dispatch.num_channels = dispatch.routing.num_channels;
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
  const std::vector<Tensor> made =
      allocate({int32({nodes, channels}), int32({ranks, channels}), int32({nodes}), int32({ranks}),
                int32({record.num_tokens, nodes})},
               args.options);
  InternodeHandle& handle = job.result.internode_handle;
  handle.is_token_in_rank = args.layout.is_token_in_rank;
  handle.rdma_channel_prefix_matrix = made[0];
  handle.gbl_channel_prefix_matrix = made[1];
  handle.recv_rdma_rank_prefix_sum = made[2];
  handle.recv_gbl_rank_prefix_sum = made[3];
  handle.send_rdma_head = made[4];
  job.tokens_per_expert.resize(record.num_experts / ranks);

  internode::NotifyDispatchParams& notify = job.notify;
  notify.call = job.dispatch.call;
  notify.num_tokens_per_rank = args.layout.num_tokens_per_rank.as<const std::int32_t>();
  notify.num_tokens_per_expert = args.layout.num_tokens_per_expert.as<const std::int32_t>();
  notify.topk_idx = args.topk_idx;
  notify.routing = routing_of(handle);
  notify.max_rows = args.num_worst_tokens;
  notify.wait_stats = args.dispatch_wait_recv_cost_stats.as<std::int64_t>();
  if (args.num_worst_tokens == 0) {
    notify.num_recv_rows = &job.num_recv_rows;
    notify.num_recv_records = &job.num_recv_records;
    notify.recv_tokens_per_expert = job.tokens_per_expert.data();
  }
  job.dispatch.routing = notify.routing;
  job.dispatch.num_channels = channels;
}

/// What of the handle comes with the rows.
void Buffer::Impl::place_internode_handle(InternodeDispatchJob& job, std::int64_t rows,
                                          std::int64_t records) {
  const std::int64_t channels = job.dispatch.num_channels;
  const std::int64_t meta_bytes = internode::get_source_meta_bytes();
  const auto view = [&](DType dtype, std::int64_t length, std::int64_t columns) {
    return TensorView(nullptr, dtype, {length, columns}, options_.device);
  };
  const std::vector<Tensor> made = allocate({view(DType::kUint8, rows, meta_bytes),
                                             view(DType::kInt32, records, topology_.ranks_per_node),
                                             view(DType::kInt32, topology_.num_nodes(), channels),
                                             view(DType::kInt32, topology_.num_ranks, channels)},
                                            job.args.options);
  InternodeHandle& handle = job.result.internode_handle;
  handle.recv_src_meta = made[0];
  handle.send_nvl_head = made[1];
  handle.recv_rdma_channel_prefix_matrix = made[2];
  handle.recv_gbl_channel_prefix_matrix = made[3];
  job.dispatch.routing = routing_of(handle);
}

void Buffer::Impl::internode_notify(InternodeDispatchJob& job) {
  if (job.layout) internode::get_dispatch_layout(*backend_, *job.layout);
  internode::notify_dispatch(*backend_, job.notify);
}

Buffer::Impl::InternodeCounts Buffer::Impl::find_internode_counts(
    const std::shared_ptr<InternodeDispatchJob>& job) {
  const DispatchArgs& args = job->args;
  DispatchResult& result = job->result;
  if (args.internode_handle) {
    result.num_recv_tokens = args.internode_handle->recv_src_meta.shape[0];
    return {result.num_recv_tokens, args.internode_handle->send_nvl_head.shape[0]};
  }
  if (args.prepared) {
    result.num_recv_tokens = args.prepared->num_recv_tokens;
    result.num_recv_tokens_per_expert_list = args.prepared->num_recv_tokens_per_expert_list;
    return {result.num_recv_tokens, args.prepared->num_rdma_recv_tokens};
  }
  if (args.num_worst_tokens > 0) {
    result.num_recv_tokens = -1;
    return {args.num_worst_tokens, args.num_worst_tokens};
  }
  submit_now(*job, Backend::Part::kBegin, [this, job] { internode_notify(*job); });
  take_counts(*job);
  return {result.num_recv_tokens, job->num_recv_records};
}

PreparedDispatch Buffer::Impl::internode_prepare(const DispatchArgs& args) {
  const std::shared_ptr<InternodeDispatchJob> job =
      make_internode_dispatch("prepare_dispatch", args);
  job->notify.call.record.kind = protocol::OpKind::kPrepareDispatch;
  submit_now(*job, Backend::Part::kWhole, [this, job] { internode_notify(*job); });
  take_counts(*job);
  PreparedDispatch prepared = take_prepared(*job, job->notify.call.record);
  prepared.internode_handle = job->result.internode_handle;
  prepared.num_rdma_recv_tokens = job->num_recv_records;
  return prepared;
}

DispatchResult Buffer::Impl::internode_dispatch(const DispatchArgs& args) {
  if (topology_.num_nodes() == 1) {
    throw Error(ErrorCode::kUnsupported,
                "internode_dispatch: all ranks are of one node, use dispatch or "
                "intranode_dispatch");
  }
  return collective("internode_dispatch", [&] {
    const std::shared_ptr<InternodeDispatchJob> job =
        make_internode_dispatch("internode_dispatch", args);
    DispatchResult& result = job->result;
    const auto [rows, records] = find_internode_counts(job);
    const bool counts_come_late = !job->dispatch.cached && args.num_worst_tokens > 0;
    place_results(*job, job->dispatch, rows);
    if (!args.internode_handle) place_internode_handle(*job, rows, records);
    if (args.group_rows) {
      const InternodeHandle& handle =
          args.internode_handle ? *args.internode_handle : result.internode_handle;
      allocate_groups(*job, job->dispatch, rows, num_received_rows(handle));
    }
    const bool counted = !job->dispatch.cached && !counts_come_late;
    result.event = backend_->submit(
        args.options,
        stage(job->number, true, args.options,
              [this, job, counts_come_late] {
                if (counts_come_late) internode_notify(*job);
                internode::dispatch(*backend_, job->dispatch);
                if (job->args.group_rows) intranode::group_rows(*backend_, job->group);
              }),
        counted && !options_.allocator ? Backend::Part::kEnd : Backend::Part::kWhole);
    return take_result(job);
  });
}

CombineResult Buffer::Impl::internode_combine(const CombineArgs& args) {
  if (topology_.num_nodes() == 1) {
    throw Error(ErrorCode::kUnsupported,
                "internode_combine: all ranks are of one node, use combine or intranode_combine");
  }
  return collective("internode_combine", [&] {
    auto job = make_recycled<InternodeCombineJob>(args);
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
    if (args.groups) reduce_first(*job, params, num_received_rows(args.internode_handle));
    job->result.event =
        backend_->submit(args.options, stage(number, true, args.options, [this, job] {
                           if (job->args.groups) intranode::reduce_rows(*backend_, job->reduce);
                           internode::cached_notify(*backend_, job->params);
                           internode::combine(*backend_, job->params);
                         }));
    return take_result(job);
  });
}

}  // namespace deep_ep
