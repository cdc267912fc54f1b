#include "distributed.hpp"

#include <chrono>

namespace moe {
namespace {

using deep_ep::DType;
using deep_ep::TensorView;

/// Charges the time since the last lap to a phase.
class Stopwatch {
 public:
  explicit Stopwatch(Account& account) : account_(account) {}

  void lap(Phase phase) {
    const auto now = std::chrono::steady_clock::now();
    account_.seconds[static_cast<std::size_t>(phase)] +=
        std::chrono::duration<double>(now - start_).count();
    start_ = now;
  }

 private:
  Account& account_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// The library takes and returns plain arrays: pointer, type, shape.
TensorView as_tensor(const Bf16Rows& rows) {
  return {rows.data(), DType::kBfloat16, {rows.rows(), rows.cols()}};
}
TensorView as_tensor(const IdRows& rows) {
  return {rows.data(), DType::kInt64, {rows.rows(), rows.cols()}};
}
TensorView as_tensor(const Rows& rows) {
  return {rows.data(), DType::kFloat32, {rows.rows(), rows.cols()}};
}
template <class Matrix>
Eigen::Map<const Matrix> as_matrix(const TensorView& tensor) {
  return {tensor.as<typename Matrix::Scalar>(), tensor.shape[0], tensor.shape[1]};
}

void count_traffic(const deep_ep::DispatchLayout& layout, int rank, Account& account) {
  const TensorView& per_rank = layout.num_tokens_per_rank;
  for (std::int64_t r = 0; r < per_rank.numel(); ++r) account.rows += per_rank.as<int>()[r];
  account.rows_to_self += per_rank.as<int>()[rank];

  const TensorView& per_expert = layout.num_tokens_per_expert;
  account.load.resize(static_cast<std::size_t>(per_expert.numel()));
  for (std::size_t e = 0; e < account.load.size(); ++e) account.load[e] += per_expert.as<int>()[e];
}

}  // namespace

Bf16Rows run_layer_on_ranks(deep_ep::Buffer& buffer, const Layer& layer, const Rows& x,
                            Account& account) {
  Stopwatch watch(account);

  // 1. Gate: each of this rank's tokens chooses experts, wherever those are.
  const Bf16Rows inputs = normalise(x);
  const Choices choices = choose_experts(layer, inputs);
  watch.lap(Phase::kGate);

  // 2. Layout: which ranks own them. Local, no communication.
  deep_ep::DispatchArgs send;
  send.layout =
      buffer.get_dispatch_layout(as_tensor(choices.experts), static_cast<int>(layer.gate.cols()));
  count_traffic(send.layout, buffer.rank(), account);
  watch.lap(Phase::kLayout);

  // Not needed for the result: without it, time spent waiting for slower ranks would be counted
  // as communication.
  buffer.barrier();
  watch.lap(Phase::kWait);

  // 3. Dispatch: every token's row goes once to each rank that owns one of its experts.
  send.x = as_tensor(inputs);
  send.topk_idx = as_tensor(choices.experts);
  send.topk_weights = as_tensor(choices.weights);
  const deep_ep::DispatchResult received = buffer.dispatch(send);
  watch.lap(Phase::kDispatch);

  // 4. Experts: received rows name local experts, -1 stands for those of other ranks. What goes
  // back is one row per received row, summed over the experts of this rank.
  const ChoicesView wanted{as_matrix<IdRows>(received.recv_topk_idx),
                           as_matrix<Rows>(received.recv_topk_weights)};
  const Bf16Rows outputs =
      sum_of_experts(layer.experts, wanted, as_matrix<Bf16Rows>(received.recv_x))
          .cast<Eigen::bfloat16>();
  watch.lap(Phase::kExperts);
  buffer.barrier();
  watch.lap(Phase::kWait);

  // 5. Combine: the rows return to their tokens and are summed over the ranks.
  deep_ep::CombineArgs back;
  back.x = as_tensor(outputs);
  back.handle = received.handle;
  const deep_ep::CombineResult result = buffer.combine(back);
  watch.lap(Phase::kCombine);
  return as_matrix<Bf16Rows>(result.combined_x);
}

}  // namespace moe
