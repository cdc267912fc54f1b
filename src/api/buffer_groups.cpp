#include <numeric>

#include "api/dispatch_job.hpp"
#include "api/validate.hpp"
#include "base/error.hpp"
#include "plan/groups.hpp"

namespace deep_ep {

/// Rows of all groups as far as the host knows, room for them where it does not.
std::int64_t Buffer::Impl::choose_grouped_rows(const AnyDispatchJob& job) const {
  const DispatchArgs& args = job.args;
  std::int64_t rows = 0;
  if (args.num_worst_tokens == 0) {
    const std::vector<std::int32_t>& list = job.result.num_recv_tokens_per_expert_list;
    rows = std::accumulate(list.begin(), list.end(), std::int64_t{0});
  } else if (args.grouped_x.defined()) {
    rows = args.grouped_x.shape[0];
  } else {
    const plan::GroupShape& shape = job.group.shape;
    rows = plan::worst_grouped_rows(shape.num_rows, shape.num_topk, shape.num_local_experts,
                                    shape.expert_alignment);
  }
  require(rows <= INT32_MAX, "there may be {} grouped rows, at most 2^31 - 1 are allowed", rows);
  return rows;
}

void Buffer::Impl::allocate_groups(AnyDispatchJob& job, const DispatchStep& dispatch,
                                   std::int64_t rows, const std::int32_t* num_received_rows) {
  const DispatchArgs& args = job.args;
  DispatchResult& result = job.result;
  intranode::GroupParams& group = job.group;
  plan::GroupShape& shape = group.shape;
  group.num_received_rows = num_received_rows;
  group.known = args.groups.has_value();
  shape.num_rows = rows;
  if (group.known) {
    shape.num_topk = args.groups->grouped_rows.shape[1];
    shape.num_local_experts = static_cast<int>(args.groups->group_offsets.shape[0]) - 1;
    shape.num_grouped_rows = args.groups->recv_rows.shape[0];
  } else {
    const protocol::CallRecord& record = dispatch.call.record;
    shape.num_topk = record.num_topk;
    shape.num_local_experts = record.num_experts / bootstrap_->size();
    shape.expert_alignment =
        args.prepared ? args.prepared->expert_alignment : args.expert_alignment;
    shape.num_grouped_rows = choose_grouped_rows(job);
  }
  const std::int64_t grouped = shape.num_grouped_rows;
  validate_output("grouped_x", args.grouped_x, args.x, grouped, options_.device);
  validate_output("grouped_x_scales", args.grouped_x_scales, args.x_scales, grouped,
                  options_.device);

  std::vector<TensorView> views;
  std::vector<Tensor*> made;
  const auto make = [&](Tensor& tensor, DType dtype, std::initializer_list<std::int64_t> lengths) {
    views.emplace_back(nullptr, dtype, lengths, options_.device);
    made.push_back(&tensor);
  };
  const auto place = [&](Tensor& tensor, const TensorView& given, const TensorView& like) {
    if (!like.defined()) return;
    if (given.defined()) {
      tensor = TensorView(given.data, like.dtype, {grouped, like.shape[1]}, options_.device);
    } else {
      make(tensor, like.dtype, {grouped, like.shape[1]});
    }
  };
  place(result.grouped_x, args.grouped_x, args.x);
  place(result.grouped_x_scales, args.grouped_x_scales, args.x_scales);
  if (group.known) {
    result.groups = *args.groups;
  } else {
    make(result.groups.group_offsets, DType::kInt32, {shape.num_local_experts + 1});
    make(result.groups.grouped_rows, DType::kInt32, {rows, shape.num_topk});
    make(result.groups.recv_rows, DType::kInt32, {grouped});
    if (args.topk_weights.defined()) make(result.groups.weights, DType::kFloat32, {grouped});
  }
  const std::vector<Tensor> memory = allocate_private(std::move(views), args.options);
  for (std::size_t i = 0; i < made.size(); ++i) *made[i] = memory[i];
  set_arrays(job, dispatch);
}

void Buffer::Impl::set_arrays(AnyDispatchJob& job, const DispatchStep& dispatch) {
  intranode::GroupParams& group = job.group;
  const DispatchResult& result = job.result;
  group.call = dispatch.call;
  group.recv_topk_idx = result.recv_topk_idx;
  group.recv_topk_weights = result.recv_topk_weights.as<const float>();
  group.groups = {result.groups.group_offsets.as<std::int32_t>(),
                  result.groups.grouped_rows.as<std::int32_t>(),
                  result.groups.recv_rows.as<std::int32_t>(), result.groups.weights.as<float>()};
  group.x_bytes = dispatch.format.x_bytes;
  group.scale_bytes = dispatch.format.scale_bytes;
  group.x = result.recv_x.as<const std::byte>();
  group.scales = result.recv_x_scales.as<const std::byte>();
  group.grouped_x = result.grouped_x.as<std::byte>();
  group.grouped_x_scales = result.grouped_x_scales.as<std::byte>();
}

}  // namespace deep_ep
