#include "backend/host/agreement.hpp"

#include <fmt/format.h>

#include "deep_ep/types.hpp"

namespace deep_ep::host {

namespace {

std::string operation_name(protocol::OpKind kind) {
  switch (kind) {
    case protocol::OpKind::kBarrier:
      return "barrier";
    case protocol::OpKind::kDispatch:
      return "dispatch";
    case protocol::OpKind::kCachedDispatch:
      return "dispatch with a handle";
    case protocol::OpKind::kCombine:
      return "combine";
    default:
      return fmt::format("operation {}", static_cast<unsigned>(kind));
  }
}

std::string dtype_name(std::int32_t dtype) {
  return dtype < 0 ? "none" : to_string(static_cast<DType>(dtype));
}

}  // namespace

std::optional<Difference> find_difference(const protocol::CallRecord& mine,
                                          const protocol::CallRecord& theirs) {
  std::optional<Difference> found;
  const auto compare = [&](const char* field, auto a, auto b, auto&& name) {
    if (!found && a != b) found = Difference{field, name(a), name(b)};
  };
  const auto number = [](auto value) { return fmt::format("{}", value); };
  compare("the operation", mine.kind, theirs.kind, operation_name);
  compare("the dtype of x", mine.x_dtype, theirs.x_dtype, dtype_name);
  compare("hidden (values a row of x)", mine.hidden, theirs.hidden, number);
  compare("the dtype of x_scales", mine.scale_dtype, theirs.scale_dtype, dtype_name);
  compare("scales a row of x_scales", mine.num_scales, theirs.num_scales, number);
  compare("topk (columns of topk_idx or topk_weights)", mine.num_topk, theirs.num_topk, number);
  compare("the dtype of topk_idx", mine.topk_dtype, theirs.topk_dtype, dtype_name);
  compare("whether topk_weights is given", mine.has_topk_weights, theirs.has_topk_weights, number);
  compare("num_experts (length of num_tokens_per_expert)", mine.num_experts, theirs.num_experts,
          number);
  compare("the handle's rank_prefix_matrix (its hash)", mine.routing_hash, theirs.routing_hash,
          number);
  return found;
}

}  // namespace deep_ep::host
