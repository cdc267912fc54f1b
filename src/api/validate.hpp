#pragma once

#include "backend/params.hpp"
#include "deep_ep/buffer.hpp"
#include "plan/layout.hpp"
#include "plan/recv_arrays.hpp"

// Checks of arguments that need no look at the data. All throw Error(kInvalidArgument) naming
// argument, value and what is allowed.
namespace deep_ep {

void validate(const BufferOptions& options, int rank, int num_ranks);
void validate(const CallOptions& options);

/// num_experts, which is given, against what must be given with it and what must not.
void validate_num_experts(const DispatchArgs& args);
plan::RoutingShape validate_topk_idx(const TensorView& topk_idx, int num_experts, int num_ranks,
                                     Device device);

/// A dispatch's shapes: what its rows carry, and the record that the ranks compare.
struct DispatchShape {
  plan::RowFormat format;
  protocol::CallRecord record;
};
DispatchShape validate_dispatch(const DispatchArgs& args, int num_ranks, Device device);
/// The same over several nodes.
DispatchShape validate_internode_dispatch(const DispatchArgs& args, const plan::Topology& topology,
                                          Device device);
/// What must not be given to prepare_dispatch.
void validate_prepare(const DispatchArgs& args);
/// An output that the caller brings, if it does, of `rows` rows like those of the input `like`.
void validate_output(const char* name, const TensorView& output, const TensorView& like,
                     std::int64_t rows, Device device);

protocol::CallRecord validate_combine(const CombineArgs& args, int num_ranks, Device device);
protocol::CallRecord validate_internode_combine(const CombineArgs& args,
                                                const plan::Topology& topology, Device device);

// Parts of the above, for both modes.

/// All of a dispatch but where rows go.
DispatchShape validate_payload(const DispatchArgs& args, int num_ranks, Device device);
/// Of a dispatch without a handle: where rows go.
void add_routing(const DispatchArgs& args, int num_ranks, Device device, DispatchShape& shape);
/// What must not be given together with `handle`, the argument of that name.
void refuse_with_handle(const DispatchArgs& args, const char* handle);
/// Of a dispatch with counts that were found before: all but their handle. `given` says whether
/// `handle`, the argument of that name, is given too.
void add_prepared(const DispatchArgs& args, bool given, const char* handle, int num_ranks,
                  Device device, DispatchShape& shape);
/// What a dispatch with group_rows must be given; `handle_rows`: received rows of the handle, -1
/// without one.
void validate_groups(const DispatchArgs& args, std::int64_t handle_rows, Device device);
/// Groups of `rows` received rows.
void expect_groups(const RowGroups& groups, std::int64_t rows, Device device);
/// Rows of topk_weights in a combine whose handle has `handle_rows` received ones.
std::int64_t validate_summands(const CombineArgs& args, std::int64_t handle_rows, Device device);
/// All of a combine but its handle, of `tokens` tokens and, if topk_weights is given, `rows` rows.
protocol::CallRecord validate_sums(const CombineArgs& args, std::int64_t tokens, std::int64_t rows,
                                   int num_ranks, Device device);

}  // namespace deep_ep
