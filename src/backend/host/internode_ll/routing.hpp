#pragma once

#include <cstdint>
#include <vector>

#include "deep_ep/tensor.hpp"
#include "plan/low_latency.hpp"

namespace deep_ep::host::internode_ll {

/// Where this rank's tokens go. Message j for a rank is the j-th token that has one of its experts.
struct Routing {
  struct Entry {
    std::int32_t rank;  // -1: no expert
    std::int32_t local_expert;
    std::int32_t index;  // of the token among this rank's tokens that name the expert
  };
  std::int64_t num_tokens = 0;
  std::vector<Entry> entries;               // [N, K]
  std::vector<std::int32_t> message_of;     // [N, R], -1: the token does not go there
  std::vector<std::int32_t> num_messages;   // [R]
  std::vector<std::int32_t> expert_counts;  // [E] rows for each expert

  /// Throws Error(kInvalidArgument) for an id that is no expert.
  void build(const plan::LowLatencyShape& shape, const TensorView& topk_idx);

 private:
  template <class Id>
  void build_from(const plan::LowLatencyShape& shape, const Id* ids);

  std::vector<std::int32_t> last_token_;  // [E] that names the expert
};

}  // namespace deep_ep::host::internode_ll
