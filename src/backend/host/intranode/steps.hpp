#pragma once

#include "backend/host/context.hpp"

// The steps of deep_ep::intranode on the host: one file each, of the same name.
namespace deep_ep::host::intranode {

void notify_dispatch(Context& context, const deep_ep::intranode::NotifyDispatchParams& params);
void dispatch(Context& context, const deep_ep::intranode::DispatchParams& params);
void combine(Context& context, const deep_ep::intranode::CombineParams& params);

}  // namespace deep_ep::host::intranode
