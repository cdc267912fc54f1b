#pragma once

#include <cstdint>

#include "base/portable.hpp"

namespace deep_ep::plan {

/// Received rows by local expert: see RowGroups in deep_ep/handle.hpp.
struct GroupShape {
  std::int64_t num_rows = 0;  // that there is room for; those received may be fewer
  std::int64_t num_topk = 0;
  int num_local_experts = 0;
  int expert_alignment = 1;
  std::int64_t num_grouped_rows = 0;  // that there is room for
};

struct RowGroupArrays {
  std::int32_t* group_offsets = nullptr;  // [L + 1]
  std::int32_t* grouped_rows = nullptr;   // [num_rows, K]
  std::int32_t* recv_rows = nullptr;      // [num_grouped_rows]
  float* weights = nullptr;               // [num_grouped_rows] or null
};

/// Grouped rows that suffice for any routing of `num_rows` rows: every entry may name an expert of
/// this rank, and every group that is not empty may need expert_alignment - 1 rows of padding.
constexpr std::int64_t worst_grouped_rows(std::int64_t num_rows, std::int64_t num_topk,
                                          int num_local_experts, int expert_alignment) {
  const std::int64_t entries = num_rows * num_topk;
  const std::int64_t groups = entries < num_local_experts ? entries : num_local_experts;
  return entries + groups * (expert_alignment - 1);
}

/// First row of the group behind one that begins at `offset` and has `entries` entries.
DEEP_EP_HD constexpr std::int64_t next_group_offset(std::int64_t offset, std::int64_t entries,
                                                    int expert_alignment) {
  return offset + (entries + expert_alignment - 1) / expert_alignment * expert_alignment;
}

/// Fills `groups` from the first `received` rows of recv_topk_idx [num_rows, K], local ids or -1,
/// and recv_topk_weights, which may be null if groups.weights is. Returns the rows of all groups;
/// if they are more than there is room for, only the offsets of those that fit are right. Id is
/// int32_t or int64_t.
template <class Id>
std::int64_t build_row_groups(const GroupShape& shape, std::int64_t received,
                              const Id* recv_topk_idx, const float* recv_topk_weights,
                              const RowGroupArrays& groups);

}  // namespace deep_ep::plan
