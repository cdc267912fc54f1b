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
/// What must not be given to prepare_dispatch.
void validate_prepare(const DispatchArgs& args);
/// An output that the caller brings, if it does, of `rows` rows like those of the input `like`.
void validate_output(const char* name, const TensorView& output, const TensorView& like,
                     std::int64_t rows, Device device);

protocol::CallRecord validate_combine(const CombineArgs& args, int num_ranks, Device device);

}  // namespace deep_ep
