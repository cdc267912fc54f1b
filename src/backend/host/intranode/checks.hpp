#pragma once

#include <functional>

#include "backend/host/context.hpp"

// What must hold before a step writes to other ranks' memory. All throw Error(kInvalidArgument).
namespace deep_ep::host::intranode {

/// topk_idx, if there, against num_experts, is_token_in_rank and num_tokens_per_expert.
struct RoutingView {
  const Call& call;
  const TensorView& topk_idx;                 // [N, K] or undefined
  const bool* is_token_in_rank;               // [N, R]
  const std::int32_t* num_tokens_per_expert;  // [E]
};
void check_routing(const RoutingView& params, int num_ranks);

/// topk_idx, if there, of a dispatch whose counts were found before: its ids may be others by now.
/// `tensor`[N, R] of what was prepared says which rows go where: sent(token, rank); `unsent` is
/// what it holds where none goes.
void check_prepared_routing(const Call& call, const TensorView& topk_idx, int num_ranks,
                            const char* tensor, const char* unsent,
                            const std::function<bool(std::int64_t, std::int64_t)>& sent);

/// A handle's tensors, which may be clones or rebuilt, so that every position computed from them
/// lies in bounds.
struct HandleView {
  const std::int32_t* rank_prefix_matrix;  // [R, R]
  const std::int32_t* send_head;           // [N, R]
  std::int64_t num_tokens;
};
void check_handle(const HandleView& handle, int rank, int num_ranks);

/// The rows of a combine and their sources' token indices, which ascend within each source.
void check_rows(const deep_ep::intranode::CombineParams& params, int rank, int num_ranks);

/// The caller's grouped rows [num_rows, K] of this rank's received rows: -1, or below
/// `num_grouped`.
void check_grouped_rows(const std::int32_t* grouped_rows, std::int64_t received,
                        std::int64_t num_topk, std::int64_t num_grouped);

}  // namespace deep_ep::host::intranode
