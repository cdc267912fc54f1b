#pragma once

#include "backend/host/internode/state.hpp"

// The steps of deep_ep::internode on the host: one file each, of the same name.
namespace deep_ep::host::internode {

void barrier(State& state, const deep_ep::internode::BarrierParams& params);
void notify_dispatch(State& state, const deep_ep::internode::NotifyDispatchParams& params);
void dispatch(State& state, const deep_ep::internode::DispatchParams& params);
void cached_notify(State& state, const deep_ep::internode::CombineParams& params);
void combine(State& state, const deep_ep::internode::CombineParams& params);

}  // namespace deep_ep::host::internode
