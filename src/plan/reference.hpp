#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "deep_ep/types.hpp"

namespace deep_ep::plan::reference {

// Dispatch and combine as plain loops over a global view of all ranks. The oracle of every test;
// shares nothing with a backend or plan/layout. Wrong shapes, sizes and expert ids throw
// Error(kInvalidArgument).

/// One rank's input. Arrays are row-major. scales are absent if scale_bytes is 0, topk_weights if
/// they are empty on every rank.
struct DispatchInput {
  std::int64_t num_tokens = 0;
  std::vector<std::byte> x;            // [N, x_bytes]
  std::vector<std::byte> scales;       // [N, scale_bytes]
  std::vector<std::int64_t> topk_idx;  // [N, K]
  std::vector<float> topk_weights;     // [N, K]
};

/// One rank's output, rows in (source rank, token index) order.
struct DispatchOutput {
  std::int64_t num_rows = 0;
  std::vector<std::byte> x;
  std::vector<std::byte> scales;
  std::vector<std::int64_t> topk_idx;                     // local expert id or -1
  std::vector<float> topk_weights;                        // 0 where topk_idx is -1
  std::vector<std::int32_t> src_rank;                     // [Nr]
  std::vector<std::int32_t> src_idx;                      // [Nr]
  std::vector<std::int32_t> num_tokens_per_local_expert;  // entries of topk_idx, aligned
  std::vector<std::int32_t> rank_prefix_matrix;           // [R, R]
};

struct DispatchShape {
  int num_topk = 0;
  int num_experts = 0;
  int num_ranks = 0;
  std::int64_t x_bytes = 0;
  std::int64_t scale_bytes = 0;
  int expert_alignment = 1;
};

std::vector<DispatchOutput> dispatch(const DispatchShape& shape,
                                     const std::vector<DispatchInput>& inputs);

/// One rank's received rows by local expert, as RowGroups in deep_ep/handle.hpp describes them.
struct RowGroups {
  std::vector<std::int32_t> group_offsets;  // [L + 1]
  std::vector<std::int32_t> grouped_rows;   // [Nr, K]
  std::vector<std::int32_t> recv_rows;      // [G]
  std::vector<float> weights;               // [G], empty without topk_weights
};
RowGroups group_rows(const DispatchOutput& received, int num_topk, int num_local_experts,
                     int expert_alignment);

/// `num_rows` rows of dtype: row r is the sum of the grouped rows g of x with recv_rows[g] == r, in
/// ascending g: sum = fma(weights[g], x[g], sum) in fp32 from +0, or without weights sum + x[g];
/// rounded once by from_float.
struct GroupedInput {
  std::vector<std::byte> x;             // [G, H]
  std::vector<std::int32_t> recv_rows;  // [G]
  std::vector<float> weights;           // [G] or empty
};
std::vector<std::byte> reduce_rows(DType dtype, std::int64_t hidden, std::int64_t num_rows,
                                   const GroupedInput& input);

/// One rank's input to combine: a row per received row of `routing`; x may be longer. topk_weights
/// are absent if they are empty on every rank.
struct CombineInput {
  std::vector<std::byte> x;         // [Nr, H] of dtype
  std::vector<float> topk_weights;  // [Nr, K]
  std::vector<std::byte> bias[2];   // [N, H] of dtype, or empty
};
struct CombineOutput {
  std::vector<std::byte> x;         // [N, H]
  std::vector<float> topk_weights;  // [N, K] if given
};

/// `routing` is what dispatch gave and `num_tokens` each rank's N. Every sum starts at +0 in fp32,
/// adds the token's rows in ascending rank order, then bias[0], then bias[1], and is rounded once
/// by from_float. Weights are summed likewise.
/// If `ranks_per_node` is less than the number of ranks, which it divides, the rows of each node
/// are summed so by themselves, and rounded; then the nodes' sums, and biases, take the rows' place
/// in ascending order of nodes.
std::vector<CombineOutput> combine(DType dtype, std::int64_t hidden, int num_topk,
                                   const std::vector<DispatchOutput>& routing,
                                   const std::vector<std::int64_t>& num_tokens,
                                   const std::vector<CombineInput>& inputs,
                                   int ranks_per_node = INT_MAX);

}  // namespace deep_ep::plan::reference
