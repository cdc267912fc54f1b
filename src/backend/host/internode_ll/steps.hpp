#pragma once

#include "backend/host/internode_ll/state.hpp"
#include "backend/params.hpp"

// The steps of deep_ep::internode_ll on the host: one file each, of the same name.
namespace deep_ep::host::internode_ll {

void dispatch(State& state, const deep_ep::internode_ll::DispatchParams& params);
void combine(State& state, const deep_ep::internode_ll::CombineParams& params);

}  // namespace deep_ep::host::internode_ll
