#pragma once

#include <cstdint>
#include <vector>

#include "backend/host/internode/state.hpp"

// What must hold before a step writes to other ranks' memory.
namespace deep_ep::host::internode {

/// Rows that a handle sends to each rank [R], by its gbl_channel_prefix_matrix.
std::vector<std::int32_t> rows_of(const deep_ep::internode::Routing& routing, int num_ranks);

/// This rank's half of a handle, which may be cloned or rebuilt, so that every position computed
/// from it lies in bounds. Throws Error(kInvalidArgument).
void check_sends(const deep_ep::internode::Routing& routing, std::int64_t num_tokens,
                 const plan::Topology& topology);

/// The same for a cached or prepared dispatch, and that its ids go where its rows do.
void check_cached(const deep_ep::internode::DispatchParams& params, const plan::Topology& topology);

/// The other half, against what the ranks have announced: `room` is how many received rows there is
/// room for. Throws Error(kInvalidArgument) for what does not fit this handle's own tensors,
/// Error(kDisagreement) naming the rank whose handle is of another dispatch.
void check_receives(State& state, const deep_ep::internode::Routing& routing, std::int64_t room);

/// recv_src_meta and send_nvl_head of a handle, behind check_receives(), for a combine.
void check_rows(State& state, const deep_ep::internode::CombineParams& params);

}  // namespace deep_ep::host::internode
