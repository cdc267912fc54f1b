#include "backend/agreement.hpp"

#include <fmt/format.h>

#include "deep_ep/types.hpp"

namespace deep_ep {

namespace {

std::string operation_name(std::int64_t kind) {
  switch (static_cast<protocol::OpKind>(kind)) {
    case protocol::OpKind::kBarrier:
      return "barrier";
    case protocol::OpKind::kDispatch:
      return "dispatch";
    case protocol::OpKind::kCachedDispatch:
      return "dispatch with a handle";
    case protocol::OpKind::kCombine:
      return "combine";
    case protocol::OpKind::kPrepareDispatch:
      return "prepare_dispatch";
    case protocol::OpKind::kPreparedDispatch:
      return "dispatch of what was prepared";
    case protocol::OpKind::kLowLatencyDispatch:
      return "low_latency_dispatch";
    case protocol::OpKind::kLowLatencyCombine:
      return "low_latency_combine";
    default:
      return fmt::format("operation {}", kind);
  }
}

std::string dtype_name(std::int64_t dtype) {
  return dtype < 0 ? "none" : to_string(static_cast<DType>(dtype));
}

std::string number(std::int64_t value) {
  return fmt::format("{}", static_cast<std::uint64_t>(value));
}

/// In the order of CallRecord::agreed().
struct Field {
  const char* name;
  std::string (*text)(std::int64_t);
};
constexpr Field kFields[] = {
    {"the operation", operation_name},
    {"the dtype of x", dtype_name},
    {"hidden (values a row of x)", number},
    {"the dtype of x_scales", dtype_name},
    {"scales a row of x_scales", number},
    {"topk (columns of topk_idx or topk_weights)", number},
    {"the dtype of topk_idx", dtype_name},
    {"whether topk_weights is given", number},
    {"num_experts (length of num_tokens_per_expert)", number},
    {"the handle's rank_prefix_matrix (its hash)", number},
    {"num_max_dispatch_tokens_per_rank", number},
    {"the format (0: expert-major, 1: rank-major)", number},
    {"the format of rows on their way home (0: bfloat16, 1: use_logfmt, 2: use_fp8)", number},
};
static_assert(std::size(kFields) == protocol::CallRecord::kNumAgreed);

}  // namespace

Difference describe_difference(int field, std::int64_t mine, std::int64_t theirs) {
  const Field& one = kFields[field];
  return {one.name, one.text(mine), one.text(theirs)};
}

std::optional<Difference> find_difference(const protocol::CallRecord& mine,
                                          const protocol::CallRecord& theirs) {
  for (int i = 0; i < protocol::CallRecord::kNumAgreed; ++i) {
    if (mine.agreed(i) != theirs.agreed(i))
      return describe_difference(i, mine.agreed(i), theirs.agreed(i));
  }
  return std::nullopt;
}

}  // namespace deep_ep
