#include "backend/host/internode_ll/routing.hpp"

#include "base/error.hpp"

namespace deep_ep::host::internode_ll {

void Routing::build(const plan::LowLatencyShape& shape, const TensorView& topk_idx) {
  num_tokens = topk_idx.shape[0];
  entries.resize(num_tokens * shape.num_topk);
  message_of.assign(num_tokens * shape.num_ranks, -1);
  num_messages.assign(shape.num_ranks, 0);
  expert_counts.assign(shape.num_experts, 0);
  last_token_.assign(shape.num_experts, -1);
  if (topk_idx.dtype == DType::kInt64) {
    build_from(shape, topk_idx.as<const std::int64_t>());
  } else {
    build_from(shape, topk_idx.as<const std::int32_t>());
  }
}

template <class Id>
void Routing::build_from(const plan::LowLatencyShape& shape, const Id* ids) {
  const std::int32_t local_experts = shape.num_local_experts();
  Entry* entry = entries.data();
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    std::int32_t* messages = message_of.data() + token * shape.num_ranks;
    for (int k = 0; k < shape.num_topk; ++k, ++entry) {
      const Id id = ids[token * shape.num_topk + k];
      if (id == -1) {
        *entry = {-1, -1, 0};
        continue;
      }
      require(id >= 0 && id < shape.num_experts,
              "topk_idx[{}, {}] is {}, allowed are -1 and 0 to {} (num_experts - 1)", token, k, id,
              shape.num_experts - 1);
      const auto expert = static_cast<std::int32_t>(id);
      const std::int32_t rank = expert / local_experts;
      if (last_token_[expert] != token) {
        last_token_[expert] = static_cast<std::int32_t>(token);
        ++expert_counts[expert];
      }
      *entry = {rank, expert - rank * local_experts, expert_counts[expert] - 1};
      if (messages[rank] < 0) messages[rank] = num_messages[rank]++;
    }
  }
}

}  // namespace deep_ep::host::internode_ll
