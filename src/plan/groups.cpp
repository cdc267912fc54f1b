#include "plan/groups.hpp"

#include <algorithm>
#include <vector>

#include "plan/numerics.hpp"

namespace deep_ep::plan {

namespace {

/// The offsets, of as many groups as there is room for, and the rows of all.
template <class Id>
std::int64_t find_offsets(const GroupShape& shape, std::int64_t received, const Id* recv_topk_idx,
                          std::int32_t* group_offsets) {
  std::vector<std::int64_t> entries(shape.num_local_experts, 0);
  for (std::int64_t i = 0; i < received * shape.num_topk; ++i) {
    if (recv_topk_idx[i] >= 0) ++entries[recv_topk_idx[i]];
  }
  std::int64_t offset = 0;
  for (int e = 0; e < shape.num_local_experts; ++e) {
    if (offset <= shape.num_grouped_rows) group_offsets[e] = static_cast<std::int32_t>(offset);
    offset = next_group_offset(offset, entries[e], shape.expert_alignment);
  }
  if (offset <= shape.num_grouped_rows) {
    group_offsets[shape.num_local_experts] = static_cast<std::int32_t>(offset);
  }
  return offset;
}

}  // namespace

template <class Id>
std::int64_t build_row_groups(const GroupShape& shape, std::int64_t received,
                              const Id* recv_topk_idx, const float* recv_topk_weights,
                              const RowGroupArrays& groups) {
  const std::int64_t total = find_offsets(shape, received, recv_topk_idx, groups.group_offsets);
  if (total > shape.num_grouped_rows) return total;
  std::fill_n(groups.grouped_rows, shape.num_rows * shape.num_topk, -1);
  std::fill_n(groups.recv_rows, shape.num_grouped_rows, -1);
  if (groups.weights != nullptr) std::fill_n(groups.weights, shape.num_grouped_rows, 0.0f);
  std::vector<std::int32_t> next(groups.group_offsets,
                                 groups.group_offsets + shape.num_local_experts);
  for (std::int64_t row = 0; row < received; ++row) {
    for (std::int64_t k = 0; k < shape.num_topk; ++k) {
      const std::int64_t entry = row * shape.num_topk + k;
      if (recv_topk_idx[entry] < 0) continue;
      const std::int64_t expert = recv_topk_idx[entry];
      // The group's last row is this one's if the row has named the expert before.
      const std::int32_t last = next[expert] - 1;
      const bool again =
          next[expert] > groups.group_offsets[expert] && groups.recv_rows[last] == row;
      const std::int32_t at = again ? last : next[expert]++;
      groups.grouped_rows[entry] = at;
      groups.recv_rows[at] = static_cast<std::int32_t>(row);
      if (groups.weights == nullptr) continue;
      groups.weights[at] = from_float<float>(add(groups.weights[at], recv_topk_weights[entry]));
    }
  }
  return total;
}

template std::int64_t build_row_groups(const GroupShape&, std::int64_t, const std::int32_t*,
                                       const float*, const RowGroupArrays&);
template std::int64_t build_row_groups(const GroupShape&, std::int64_t, const std::int64_t*,
                                       const float*, const RowGroupArrays&);

}  // namespace deep_ep::plan
