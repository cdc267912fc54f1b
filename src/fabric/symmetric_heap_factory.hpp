#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "deep_ep/bootstrap.hpp"
#include "fabric/memory.hpp"
#include "fabric/symmetric_heap.hpp"

namespace deep_ep::fabric {

struct SymmetricHeapOptions {
  std::int64_t bytes = 0;  ///< of each rank's heap; the same on all ranks
  std::chrono::milliseconds timeout = std::chrono::seconds(100);  ///< of reaching all ranks
  /// Wakes those who wait for words of this rank's heap: called, if given, after words were set by
  /// signals, and after a rank was found lost. On the transport's thread, or in signal() of this
  /// rank to itself. Must be quick, must not call the heap, must not throw.
  std::function<void()> on_signal;
  /// Memory of this rank that it is made of, if given: zeroed, of at least `bytes` bytes. So ranks
  /// of one node can map it too.
  std::shared_ptr<Mapping> memory;
};

/// A heap in host memory whose ranks UCX connects. Collective: all ranks get theirs, or all throw,
/// Error(kUnsupported) where libdeep_ep_ucx.so or UCX itself is missing. Each rank's heap has a
/// thread of its own, which sleeps while nothing moves, and UCX's, so ranks that are processes fork
/// before. UCX reads its own variables (UCX_TLS, UCX_NET_DEVICES, ...).
std::unique_ptr<SymmetricHeap> make_symmetric_heap(Bootstrap& bootstrap,
                                                   const SymmetricHeapOptions& options);

/// Why this machine cannot make one; empty if it can. Loads UCX.
std::string why_no_symmetric_heap();

}  // namespace deep_ep::fabric
