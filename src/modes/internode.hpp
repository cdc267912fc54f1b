#pragma once

#include <string>

#include "backend/backend.hpp"

/// High throughput over several nodes. A Buffer call is one of:
///   dispatch                notify_dispatch -> dispatch
///   dispatch with a handle  dispatch
///   dispatch, prepared      prepare_dispatch: notify_dispatch; dispatch: dispatch
///   combine                 cached_notify -> combine
/// With groups a dispatch ends with intranode::group_rows, and a combine begins with
/// intranode::reduce_rows, which are local.
/// A Buffer of several nodes: get_unique_id at its construction, init -> alloc when the ranks of
/// each node have mapped each other's memory, free -> finalize at its end. While all ranks are of
/// one node, init and finalize do nothing.
namespace deep_ep::internode {

/// What the ranks tell each other to find their nodes, and what connects these.
struct UniqueId {
  std::string host;     // equal: can map each other's memory
  std::string process;  // equal: threads of one process
  std::string gpus{};   // as plan::split_hosts takes them; on hosts empty

  std::string encode() const { return host + " " + process + " " + gpus; }
  static UniqueId decode(const std::string& text);
};
UniqueId get_unique_id();

/// Of every Buffer, before alloc(), which joins the other nodes.
void init(Backend& backend);
/// Collective: makes the symmetric heap of at least `bytes` bytes a rank.
void alloc(Backend& backend, Bootstrap& bootstrap, std::int64_t bytes);
/// The others find this rank's heap gone. Local.
void free(Backend& backend);
/// Of every Buffer, behind free(). NVSHMEM is never left, UCX with the heap.
void finalize(Backend& backend);

/// Bytes of plan::SourceMeta, which says where a received row comes from.
int get_source_meta_bytes();

/// Which tokens go where; serves all modes. Throws Error(kInvalidArgument) naming the first bad
/// expert id.
void get_dispatch_layout(Backend& backend, const LayoutParams& params);

/// All ranks have entered the call with this epoch.
void barrier(Backend& backend, const BarrierParams& params);

/// Exchanges counts, first between nodes, then inside them. Afterwards the handle tells where every
/// row goes and how many this rank receives and passes on.
void notify_dispatch(Backend& backend, const NotifyDispatchParams& params);

/// Moves every row to its final place, over the network once for each node; returns when this
/// rank's rows have arrived and what it passes on has left.
void dispatch(Backend& backend, const DispatchParams& params);

/// Tells every rank what this one is about to combine, so that a disagreement is found before a
/// sum.
void cached_notify(Backend& backend, const CombineParams& params);

/// Sums rows inside each node, brings the sums home and adds them.
void combine(Backend& backend, const CombineParams& params);

}  // namespace deep_ep::internode
