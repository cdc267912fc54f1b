#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "fabric/heap.hpp"
#include "fabric/memory.hpp"

namespace deep_ep::host {

/// Memory for results that no peer writes, kept from call to call, since fresh pages cost more than
/// the work on them. Thread-safe.
class PrivateHeap : public std::enable_shared_from_this<PrivateHeap> {
 public:
  PrivateHeap();
  /// The block goes back with its last owner, which may outlive all but this object; that it keeps.
  std::shared_ptr<std::byte> allocate(std::int64_t bytes);

 private:
  fabric::Heap::NewSegment grow(std::int64_t bytes);

  std::mutex mutex_;
  std::vector<std::shared_ptr<fabric::Mapping>> segments_;
  fabric::Heap heap_;
};

}  // namespace deep_ep::host
