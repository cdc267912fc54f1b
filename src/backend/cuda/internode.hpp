#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend/cuda/context.hpp"
#include "backend/cuda/internode/steps.hpp"
#include "backend/cuda/nvshmem/plugin.hpp"
#include "deep_ep/bootstrap.hpp"
#include "deep_ep/buffer.hpp"

namespace deep_ep::cuda {

/// Loads libdeep_ep_nvshmem.so at the first call. Throws Error(kUnsupported) saying what is
/// missing.
nvshmem::NvshmemParts& nvshmem_parts();

/// The internode mode of a rank: its piece of the symmetric heap, and its kernels' arguments.
class Internode {
 public:
  Internode(Context& context, const BackendOptions& options);
  ~Internode() { free(); }
  Internode(const Internode&) = delete;
  Internode& operator=(const Internode&) = delete;

  /// Collective: loads libdeep_ep_nvshmem.so, joins NVSHMEM, gets at least `bytes` bytes of its
  /// heap.
  void alloc(Bootstrap& bootstrap, std::int64_t bytes);
  void free() noexcept;
  bool open() const { return heap_ != nullptr; }
  /// Of the calls so far, for which it waits.
  NetworkCounts counts() const;

  /// What low latency has of it: its memory, and what its kernels know of all ranks.
  const internode_ll::NodesLayout& low_latency() const { return low_latency_; }
  Comm comm_of_all(const Call& call) const;
  internode_ll::Nodes nodes(const Call& call, const internode_ll::StepArgs& step) const;
  nvshmem::NvshmemParts& parts() const { return *parts_; }

  void barrier(const deep_ep::internode::BarrierParams& params);
  void notify_dispatch(const deep_ep::internode::NotifyDispatchParams& params);
  void dispatch(const deep_ep::internode::DispatchParams& params);
  void cached_notify(const deep_ep::internode::CombineParams& params);
  /// Bytes of results that combine() takes, for what it stages for the other ranks of the node.
  std::int64_t combine_block_bytes(const deep_ep::internode::CombineParams& params) const;
  void combine(const deep_ep::internode::CombineParams& params, const Backend::Results& block);
  /// Behind the kernel that writes this rank's fault record.
  void tell_fault() noexcept;

 private:
  Comm comm(const Call& call) const;
  internode::Rails rails(const Call& call) const;
  void tell(bool leaves) noexcept;
  void find_mapped(Bootstrap& bootstrap);
  /// What notify leaves for the kernel behind it, of a call of so many tokens.
  internode::Workspace workspace(std::int64_t tokens);
  internode::NotifyArgs notify_args(const Call& call);
  struct KnownRouting {
    const deep_ep::internode::Routing& routing;
    std::int64_t rows;  // received ones that it has room for
    Ids topk_idx;       // checked, if they are there
    std::int64_t* wait_stats;
  };
  /// What the ranks tell each other ahead of a call with a handle, or a prepared one. Its kernel
  /// may wait for go_.
  void notify_cached(const Call& call, const KnownRouting& known);
  /// Whether a combine begins by what its handle says, ahead of notify's end.
  bool begins_early() const { return shape_.topology.ranks_per_node == 1; }
  static plan::RowFormat combine_format(const deep_ep::internode::CombineParams& params);
  static std::int64_t combine_rows(const deep_ep::internode::CombineParams& params);
  /// The rows to sum, where the ranks of the node can read them.
  void offer_rows(const deep_ep::internode::CombineParams& params, const Backend::Results& block,
                  internode::CombineArgs& args) const;
  void launch_notify(const internode::NotifyArgs& args, const Call& call);
  void fill_handle(const deep_ep::internode::DispatchParams& params,
                   const internode::DispatchArgs& args);

  Context& context_;
  nvshmem::NvshmemParts* parts_ = nullptr;
  internode::RailShape shape_;
  std::int64_t low_latency_bytes_ = 0;
  std::uint64_t go_ = 0;  // NotifyArgs::go of the last call
  std::unique_ptr<nvshmem::Heap> heap_;
  internode_ll::NodesLayout low_latency_;  // behind the rings, of a Buffer that has it
  std::vector<std::byte*> mapped_;  // by rank: heap_ there as mapped here, null if it is put to
  ZeroedWords state_;
  std::byte* state_base_ = nullptr;
  ZeroedWords work_;
  ZeroedWords arrived_;
};

}  // namespace deep_ep::cuda
