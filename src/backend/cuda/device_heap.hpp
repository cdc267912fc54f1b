#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cuda/context.hpp"
#include "fabric/heap.hpp"
#include "fabric/memory.hpp"

namespace deep_ep::cuda {

/// The heap of a rank's segments on a GPU. A block that is given back is used again only behind the
/// work on the streams that it was given back on: once that is done, or by making the communication
/// stream, on which everything begins that writes to a block, wait for it. Thread-safe; outlives
/// its Buffer with the last block.
class DeviceHeap : public std::enable_shared_from_this<DeviceHeap> {
 public:
  /// `grow` adds a segment, `segment` gives it.
  DeviceHeap(const Context& context, std::function<fabric::Heap::NewSegment(std::int64_t)> grow,
             std::function<std::shared_ptr<fabric::Mapping>(int)> segment)
      : device_(context.device()),
        comm_stream_(context.comm_stream()),
        heap_(std::move(grow)),
        segment_(std::move(segment)),
        events_(context.events()) {}

  /// Gives the rest of a segment to the heap.
  void add(int segment, std::int64_t begin, std::int64_t end) { heap_.add(segment, begin, end); }
  void reserve(std::int64_t bytes) { heap_.reserve(bytes); }
  std::int64_t live_bytes() const { return heap_.live_bytes(); }

  /// A block for a call whose caller works on `stream`. What the communication stream does from now
  /// on may write to it. Of a stream that is being captured the block belongs to the graph for
  /// good, and comes back only with the heap.
  Backend::Results allocate(std::int64_t bytes, cudaStream_t stream);
  /// A block that somebody else hands out, whatever is captured meanwhile: it comes back behind the
  /// streams that it is released on.
  Backend::Results allocate_raw(std::int64_t bytes);
  /// Blocks that come back later are just dropped.
  void close();

 private:
  class Lease;
  struct Pending {
    fabric::Block block;
    std::vector<std::shared_ptr<CUevent_st>> events;
  };
  Backend::Results lease_out(const fabric::Block& block, std::shared_ptr<Lease>& lease);
  void give_back(const fabric::Block& block, const std::vector<cudaStream_t>& streams) noexcept;
  void reclaim_finished();
  void reclaim_behind();

  int device_;
  cudaStream_t comm_stream_;
  fabric::Heap heap_;
  std::function<std::shared_ptr<fabric::Mapping>(int)> segment_;
  std::shared_ptr<EventPool> events_;
  std::mutex mutex_;  // guards what follows
  std::vector<Pending> pending_;
  bool closed_ = false;
};

}  // namespace deep_ep::cuda
