#include "program.hpp"

#include <algorithm>
#include <cstring>
#include <random>

#include "plan/numerics.hpp"

namespace deep_ep::sim {
namespace {

using plan::reference::CombineInput;
using plan::reference::DispatchInput;

// Small whole numbers above zero: exact in bfloat16, and so are the sums of a few.
std::vector<std::byte> random_bf16(std::mt19937_64& random, std::int64_t count) {
  std::vector<std::byte> bytes(count * sizeof(plan::Bfloat16));
  for (std::int64_t i = 0; i < count; ++i) {
    const auto value = plan::from_float<plan::Bfloat16>(static_cast<float>(1 + random() % 15));
    std::memcpy(bytes.data() + i * sizeof(value), &value, sizeof(value));
  }
  return bytes;
}

std::vector<float> random_weights(std::mt19937_64& random, std::int64_t count) {
  std::vector<float> weights(count);
  for (float& weight : weights) weight = 0.25f * static_cast<float>(1 + random() % 7);
  return weights;
}

DispatchInput random_input(std::mt19937_64& random, const Program& program) {
  DispatchInput input;
  input.num_tokens = static_cast<std::int64_t>(random() % 9);
  input.x = random_bf16(random, input.num_tokens * program.hidden);
  input.topk_idx.resize(input.num_tokens * program.num_topk);
  for (std::int64_t& id : input.topk_idx)
    id = static_cast<std::int64_t>(random() % (program.num_experts + 1)) - 1;
  input.topk_weights = random_weights(random, input.num_tokens * program.num_topk);
  return input;
}

// Elements of `tensor` that are not as expected; all of them if there are too few or too many.
template <class T>
std::int64_t differing(const TensorView& tensor, const std::vector<T>& expected) {
  const auto count = static_cast<std::int64_t>(expected.size());
  if (static_cast<std::int64_t>(tensor.nbytes()) != count * static_cast<std::int64_t>(sizeof(T)))
    return std::max<std::int64_t>(count, 1);
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < count; ++i)
    wrong += std::memcmp(tensor.as<T>() + i, &expected[i], sizeof(T)) != 0;
  return wrong;
}

}  // namespace

Program::Program(std::uint64_t seed, bool several_nodes) {
  std::mt19937_64 random(seed);
  num_ranks = 1 + static_cast<int>(random() % 4);
  if (several_nodes) {
    ranks_per_node = 1 + static_cast<int>(random() % 2);
    num_ranks = ranks_per_node * (2 + static_cast<int>(random() % 2));
  }
  num_experts = num_ranks * (1 + static_cast<int>(random() % 3));
  num_topk = 1 + static_cast<int>(random() % 4);
  hidden = 8 * (1 + static_cast<std::int64_t>(random() % 4));
  config.num_max_nvl_chunked_send_tokens = 1 + static_cast<int>(random() % 3);
  config.num_max_nvl_chunked_recv_tokens =
      config.num_max_nvl_chunked_send_tokens + static_cast<int>(random() % 3);
  config.num_max_rdma_chunked_send_tokens = config.num_max_nvl_chunked_send_tokens;
  config.num_max_rdma_chunked_recv_tokens = config.num_max_nvl_chunked_recv_tokens;
  const plan::reference::DispatchShape shape{
      .num_topk = num_topk,
      .num_experts = num_experts,
      .num_ranks = num_ranks,
      .x_bytes = hidden * static_cast<std::int64_t>(sizeof(plan::Bfloat16))};
  rounds.resize(1 + random() % 4);
  for (Round& round : rounds) {
    std::vector<std::int64_t> num_tokens;
    for (int rank = 0; rank < num_ranks; ++rank) {
      round.inputs.push_back(random_input(random, *this));
      num_tokens.push_back(round.inputs.back().num_tokens);
    }
    round.received = plan::reference::dispatch(shape, round.inputs);
    for (const auto& received : round.received) {
      CombineInput output;
      output.x = random_bf16(random, received.num_rows * hidden);
      output.topk_weights = random_weights(random, received.num_rows * num_topk);
      round.outputs.push_back(std::move(output));
    }
    round.combined =
        plan::reference::combine(DType::kBfloat16, hidden, num_topk, round.received, num_tokens,
                                 round.outputs, several_nodes ? ranks_per_node : num_ranks);
    // When nobody received a row the reference takes the weights for absent.
    for (int rank = 0; rank < num_ranks; ++rank)
      round.combined[rank].topk_weights.resize(num_tokens[rank] * num_topk);
    round.prepared = random() % 3 == 0;
    round.cached_too = random() % 2 == 0;
    round.combines = static_cast<int>(random() % 3);
  }
}

std::int64_t Program::play(Buffer& buffer) const {
  std::int64_t wrong = 0;
  for (const Round& round : rounds) wrong += play(buffer, round);
  return wrong;
}

std::int64_t Program::play(Buffer& buffer, const Round& round) const {
  DispatchResult handle;
  std::int64_t wrong = dispatch(buffer, round, handle);
  if (round.cached_too) wrong += dispatch_again(buffer, round, handle);
  for (int i = 0; i < round.combines; ++i) wrong += combine(buffer, round, handle);
  return wrong;
}

std::int64_t Program::dispatch(Buffer& buffer, const Round& round, DispatchResult& handle) const {
  const DispatchInput& input = round.inputs[buffer.rank()];
  const auto& expected = round.received[buffer.rank()];
  const std::int64_t tokens = input.num_tokens;
  const TensorView topk_idx(input.topk_idx.data(), DType::kInt64, {tokens, num_topk});
  DispatchArgs args{
      .x = TensorView(input.x.data(), DType::kBfloat16, {tokens, hidden}),
      .layout = buffer.get_dispatch_layout(topk_idx, num_experts),
      .topk_idx = topk_idx,
      .topk_weights = TensorView(input.topk_weights.data(), DType::kFloat32, {tokens, num_topk}),
      .config = config};
  if (round.prepared) args.prepared = buffer.prepare_dispatch(args);
  const DispatchResult result = buffer.dispatch(args);
  handle.handle = result.handle;
  handle.internode_handle = result.internode_handle;
  return differing(result.recv_x, expected.x) + differing(result.recv_topk_idx, expected.topk_idx) +
         differing(result.recv_topk_weights, expected.topk_weights) +
         (ranks_per_node > 0
              ? 0
              : differing(result.handle.recv_src_idx, expected.src_idx) +
                    differing(result.handle.rank_prefix_matrix, expected.rank_prefix_matrix)) +
         (result.num_recv_tokens_per_expert_list != expected.num_tokens_per_local_expert);
}

std::int64_t Program::dispatch_again(Buffer& buffer, const Round& round,
                                     const DispatchResult& handle) const {
  const DispatchInput& input = round.inputs[buffer.rank()];
  DispatchArgs args{.x = TensorView(input.x.data(), DType::kBfloat16, {input.num_tokens, hidden}),
                    .config = config};
  if (ranks_per_node > 0) {
    args.internode_handle = handle.internode_handle;
  } else {
    args.handle = handle.handle;
  }
  const DispatchResult result = buffer.dispatch(args);
  return differing(result.recv_x, round.received[buffer.rank()].x);
}

std::int64_t Program::combine(Buffer& buffer, const Round& round,
                              const DispatchResult& handle) const {
  const CombineInput& output = round.outputs[buffer.rank()];
  const auto& expected = round.combined[buffer.rank()];
  const std::int64_t rows = round.received[buffer.rank()].num_rows;
  const CombineResult result = buffer.combine(
      {.x = TensorView(output.x.data(), DType::kBfloat16, {rows, hidden}),
       .handle = handle.handle,
       .topk_weights = TensorView(output.topk_weights.data(), DType::kFloat32, {rows, num_topk}),
       .config = config,
       .internode_handle = handle.internode_handle});
  return differing(result.combined_x, expected.x) +
         differing(result.combined_topk_weights, expected.topk_weights);
}

}  // namespace deep_ep::sim
