#pragma once

#include "backend/host/context.hpp"

// The steps of deep_ep::intranode on the host: one file each, of the same name.
namespace deep_ep::host::intranode {

void notify_dispatch(Context& context, const deep_ep::intranode::NotifyDispatchParams& params);
void dispatch(Context& context, const deep_ep::intranode::DispatchParams& params);
void group_rows(Context& context, const deep_ep::intranode::GroupParams& params);
void reduce_rows(Context& context, const deep_ep::intranode::ReduceParams& params);
void cached_notify_combine(Context& context, const deep_ep::intranode::CombineParams& params);
void combine(Context& context, const deep_ep::intranode::CombineParams& params);

// The two ways of a combine; Context::pulls() says which.

/// Reads the rows from the experts' ranks.
void combine_pull(Context& context, const deep_ep::intranode::CombineParams& params);
/// The experts' ranks write the rows to the inbox.
void combine_ring(Context& context, const deep_ep::intranode::CombineParams& params);

}  // namespace deep_ep::host::intranode
