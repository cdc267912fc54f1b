#include "api/dispatch_job.hpp"
#include "api/validate.hpp"
#include "modes/intranode.hpp"

namespace deep_ep {

/// A row for each received one, where peers can read it; on GPUs it goes back behind this call.
void Buffer::Impl::reduce_first(AnyCombineJob& job, CombineStep& params,
                                const std::int32_t* num_received_rows) {
  const RowGroups& groups = *job.args.groups;
  intranode::ReduceParams& reduce = job.reduce;
  reduce.call = params.call;
  reduce.dtype = params.dtype;
  reduce.hidden = params.call.record.hidden;
  reduce.x = params.x;
  reduce.num_grouped_rows = groups.recv_rows.shape[0];
  reduce.weights = groups.weights.as<const float>();
  reduce.num_received_rows = num_received_rows;
  reduce.grouped_rows = groups.grouped_rows.as<const std::int32_t>();
  reduce.num_rows = params.handle_rows;
  reduce.num_topk = groups.grouped_rows.shape[1];
  const std::int64_t row_bytes = reduce.hidden * static_cast<std::int64_t>(size_of(reduce.dtype));
  job.reduced = backend_->allocate_scratch(reduce.num_rows * row_bytes, job.args.options.stream);
  reduce.reduced = job.reduced.data;
  params.x = reduce.reduced;
  params.num_rows = reduce.num_rows;
}

/// Inputs and results, of whatever mode.
void Buffer::Impl::place_sums(const CombineArgs& args, CombineStep& step, CombineResult& result) {
  const std::int64_t tokens = step.call.record.num_tokens;
  std::vector<TensorView> views{
      {nullptr, args.x.dtype, {tokens, args.x.shape[1]}, options_.device}};
  if (args.topk_weights.defined())
    views.push_back(
        {nullptr, DType::kFloat32, {tokens, args.topk_weights.shape[1]}, options_.device});
  const std::vector<Tensor> made = allocate(std::move(views), args.options);
  result.combined_x = made[0];
  step.dtype = args.x.dtype;
  step.x = args.x.as<const std::byte>();
  step.num_rows = args.x.shape[0];
  for (int i = 0; i < 2; ++i) step.bias[i] = args.bias[i].as<const std::byte>();
  step.combined_x = result.combined_x.as<std::byte>();
  if (args.topk_weights.defined()) {
    result.combined_topk_weights = made[1];
    step.topk_weights = args.topk_weights.as<const float>();
    step.combined_topk_weights = result.combined_topk_weights.as<float>();
  }
  step.wait_stats = args.combine_wait_recv_cost_stats.as<std::int64_t>();
}

CombineResult Buffer::Impl::intranode_combine(const CombineArgs& args) {
  require_one_node("intranode_combine");
  return collective("intranode_combine", [&] {
    auto job = make_recycled<CombineJob>(args);
    intranode::CombineParams& params = job->params;
    params.call = make_call("intranode_combine", args.config);
    params.call.record = validate_combine(args, bootstrap_->size(), options_.device);
    const std::uint64_t number = log_.begin("intranode_combine", epoch_, params.call.record);

    CombineResult& result = job->result;
    place_sums(args, params, result);
    params.handle_rows = args.handle.recv_src_idx.shape[0];
    params.rank_prefix_matrix = args.handle.rank_prefix_matrix.as<const std::int32_t>();
    params.recv_src_idx = args.handle.recv_src_idx.as<const std::int32_t>();
    params.send_head = args.handle.send_head.as<const std::int32_t>();
    params.chunk_rows = args.config.num_max_nvl_chunked_send_tokens;
    params.window_rows = args.config.num_max_nvl_chunked_recv_tokens;
    if (args.groups) reduce_first(*job, params, num_received_rows(args.handle, bootstrap_->rank()));

    result.event = backend_->submit(args.options, stage(number, true, args.options, [this, job] {
                                      if (job->args.groups)
                                        intranode::reduce_rows(*backend_, job->reduce);
                                      intranode::cached_notify_combine(*backend_, job->params);
                                      intranode::combine(*backend_, job->params);
                                    }));
    return take_result(job);
  });
}

}  // namespace deep_ep
