#pragma once

#include <cstdint>
#include <memory>

#include "deep_ep/export.hpp"
#include "deep_ep/handle.hpp"

namespace deep_ep {

/// Where the results of a Buffer's calls lie, if a framework wants its own allocator to know of
/// them (BufferOptions::allocator). Called by the thread that calls the Buffer, while it does.
class DEEP_EP_API Allocator {
 public:
  virtual ~Allocator();

  /// `bytes` of the Buffer's device, uninitialised, from a multiple of 64 bytes on; at least one
  /// byte. With `mapped`, inside what Buffer::allocate_mapped gave out. Null: the Buffer takes
  /// memory of its own. The call that `options` belongs to writes it on the Buffer's communication
  /// stream, behind options.previous_event or else the caller's stream: that no earlier work still
  /// uses the memory by then is the allocator's to see to. The result holds the pointer returned
  /// until its last copy goes; that can be on any thread. What is thrown leaves the call as its
  /// failure.
  virtual std::shared_ptr<void> allocate(std::int64_t bytes, bool mapped,
                                         const CallOptions& options) = 0;
};

}  // namespace deep_ep
