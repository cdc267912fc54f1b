#pragma once

#include "backend/backend.hpp"

/// High throughput among ranks that map each other's memory. A Buffer call is one of:
///   dispatch                notify_dispatch -> dispatch
///   dispatch with a handle  dispatch
///   dispatch, prepared      prepare_dispatch: notify_dispatch; dispatch: dispatch
///   combine                 cached_notify_combine -> combine
/// With groups a dispatch ends with group_rows, and a combine begins with reduce_rows.
namespace deep_ep::intranode {

/// All ranks have entered the call with this epoch.
void barrier(Backend& backend, const BarrierParams& params);

/// Exchanges counts. Afterwards the prefix matrices tell where every row goes and how many this
/// rank receives.
void notify_dispatch(Backend& backend, const NotifyDispatchParams& params);

/// Moves every row to its final place; returns when this rank's rows have arrived.
void dispatch(Backend& backend, const DispatchParams& params);

/// Copies this rank's rows to the groups of their experts. Local.
void group_rows(Backend& backend, const GroupParams& params);

/// Sums each received row's experts. Local.
void reduce_rows(Backend& backend, const ReduceParams& params);

/// Tells every rank what this one is about to combine, so that a disagreement is found before a
/// sum.
void cached_notify_combine(Backend& backend, const CombineParams& params);

/// Brings rows home and sums them.
void combine(Backend& backend, const CombineParams& params);

}  // namespace deep_ep::intranode
