#pragma once

#include "backend/backend.hpp"

/// High throughput over several nodes. Until that mode exists: what all modes share.
namespace deep_ep::internode {

/// Joins the symmetric heap of the nodes; nothing while all ranks are of one node.
void init(Backend& backend);
/// Drops this Buffer's reference to the symmetric heap; nothing while all ranks are of one node.
void finalize(Backend& backend);

/// Which tokens go where; serves all modes. Throws Error(kInvalidArgument) naming the first bad
/// expert id.
void get_dispatch_layout(Backend& backend, const LayoutParams& params);

}  // namespace deep_ep::internode
