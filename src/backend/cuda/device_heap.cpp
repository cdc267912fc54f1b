#include "backend/cuda/device_heap.hpp"

#include <algorithm>

#include "backend/cuda/check.hpp"
#include "base/log.hpp"
#include "base/release_hook.hpp"

namespace deep_ep::cuda {

/// One block in somebody's hands.
class DeviceHeap::Lease final : public ReleaseHook::Target {
 public:
  Lease(std::shared_ptr<DeviceHeap> heap, std::shared_ptr<fabric::Mapping> mapping,
        const fabric::Block& block)
      : heap_(std::move(heap)), mapping_(std::move(mapping)), block_(block) {}

  void add_stream(Stream stream) override {
    const std::lock_guard lock(mutex_);
    streams_.push_back(static_cast<cudaStream_t>(stream.native));
  }
  void keep_for_ever() { kept_ = true; }
  void release() noexcept override {
    if (!kept_) heap_->give_back(block_, streams_);
  }

 private:
  std::shared_ptr<DeviceHeap> heap_;
  std::shared_ptr<fabric::Mapping> mapping_;
  fabric::Block block_;
  std::mutex mutex_;
  std::vector<cudaStream_t> streams_;
  bool kept_ = false;
};

Backend::Results DeviceHeap::allocate(std::int64_t bytes, cudaStream_t stream) {
  const bool capturing = is_capturing(stream);
  std::optional<fabric::Block> block = heap_.try_allocate(bytes);
  if (!block) {
    reclaim_finished();
    block = heap_.try_allocate(bytes);
  }
  if (!block && !capturing) {
    reclaim_behind();
    block = heap_.try_allocate(bytes);
  }
  std::shared_ptr<Lease> lease;
  Backend::Results results = lease_out(block ? *block : heap_.allocate(bytes), lease);
  lease->add_stream({stream});
  if (capturing) lease->keep_for_ever();
  return results;
}

Backend::Results DeviceHeap::allocate_raw(std::int64_t bytes) {
  std::optional<fabric::Block> block = heap_.try_allocate(bytes);
  if (!block) {
    reclaim_finished();
    block = heap_.try_allocate(bytes);
  }
  std::shared_ptr<Lease> lease;
  return lease_out(block ? *block : heap_.allocate(bytes), lease);
}

Backend::Results DeviceHeap::lease_out(const fabric::Block& block, std::shared_ptr<Lease>& lease) {
  Backend::Results results;
  results.block = block;
  const auto mapping = segment_(block.segment);
  results.data = mapping->base() + block.offset;
  lease = std::make_shared<Lease>(shared_from_this(), mapping, block);
  results.owner = std::shared_ptr<void>(results.data, ReleaseHook(lease));
  return results;
}

void DeviceHeap::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  pending_.clear();
}

void DeviceHeap::give_back(const fabric::Block& block,
                           const std::vector<cudaStream_t>& streams) noexcept {
  try {
    Pending pending{block, {}};
    {
      const std::lock_guard lock(mutex_);
      if (closed_) return;
    }
    const DeviceGuard guard(device_);
    for (std::size_t i = 0; i < streams.size(); ++i) {
      if (std::find(streams.begin(), streams.begin() + i, streams[i]) != streams.begin() + i)
        continue;
      // Whoever uses the block next comes behind on the same stream.
      if (streams[i] == comm_stream_) continue;
      // Somebody captures the stream now: what the block was used for there, nobody can tell.
      if (is_capturing(streams[i])) return;
      auto event = events_->take();
      check(cudaEventRecord(event.get(), streams[i]), "cudaEventRecord");
      pending.events.push_back(std::move(event));
    }
    if (pending.events.empty()) return heap_.free(block);
    const std::lock_guard lock(mutex_);
    pending_.push_back(std::move(pending));
  } catch (const std::exception& error) {
    // The block stays in use for good: less memory, but nothing is overwritten.
    log::warn("a block of {} bytes is lost: {}", block.bytes, error.what());
  }
}

void DeviceHeap::reclaim_finished() {
  const RelaxedCapture relaxed;
  const std::lock_guard lock(mutex_);
  std::erase_if(pending_, [this](const Pending& one) {
    const bool finished = std::all_of(one.events.begin(), one.events.end(), [](const auto& event) {
      return cudaEventQuery(event.get()) == cudaSuccess;
    });
    if (finished) heap_.free(one.block);
    return finished;
  });
  (void)cudaGetLastError();  // cudaErrorNotReady is no error
}

void DeviceHeap::reclaim_behind() {
  const std::lock_guard lock(mutex_);
  for (const Pending& one : pending_) {
    for (const auto& event : one.events)
      check(cudaStreamWaitEvent(comm_stream_, event.get(), 0), "cudaStreamWaitEvent");
    heap_.free(one.block);
  }
  pending_.clear();
}

}  // namespace deep_ep::cuda
