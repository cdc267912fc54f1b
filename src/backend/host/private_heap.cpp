#include "backend/host/private_heap.hpp"

#include <algorithm>

namespace deep_ep::host {

namespace {

// Growth in steps of this size wastes little and keeps the number of segments small.
constexpr std::int64_t kLeastGrowth = 8 << 20;

}  // namespace

PrivateHeap::PrivateHeap() : heap_([this](std::int64_t bytes) { return grow(bytes); }) {}

std::shared_ptr<std::byte> PrivateHeap::allocate(std::int64_t bytes) {
  const fabric::Block block = heap_.allocate(bytes);
  std::byte* base = nullptr;
  {
    const std::lock_guard lock(mutex_);
    base = segments_[block.segment]->base();
  }
  return {base + block.offset,
          [self = shared_from_this(), block](std::byte*) { self->heap_.free(block); }};
}

fabric::Heap::NewSegment PrivateHeap::grow(std::int64_t bytes) {
  std::shared_ptr<fabric::Mapping> segment =
      fabric::allocate_private(std::max(bytes, kLeastGrowth));
  const std::lock_guard lock(mutex_);
  segments_.push_back(segment);
  return {static_cast<int>(segments_.size()) - 1, segment->bytes()};
}

}  // namespace deep_ep::host
