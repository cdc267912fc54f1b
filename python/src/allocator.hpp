#pragma once

#include <nanobind/nanobind.h>

#include "deep_ep/buffer.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// Asks a Python callable for the memory of results: allocate(bytes, mapped, previous_event given,
/// async_finish) returns None or (address, the object that owns it).
///
/// torch's pluggable allocator takes two C functions, `deep_ep_torch_alloc` and
/// `deep_ep_torch_free`, which know nothing of Buffers: while the callable runs for `mapped`
/// memory, they take it from the Buffer that this thread calls.
class ObjectAllocator final : public Allocator {
 public:
  explicit ObjectAllocator(nb::object allocate) : allocate_(std::move(allocate)) {}
  void set_buffer(Buffer* buffer) { buffer_ = buffer; }

  std::shared_ptr<void> allocate(std::int64_t bytes, bool mapped,
                                 const CallOptions& options) override;

 private:
  Reference allocate_;
  Buffer* buffer_ = nullptr;
};

}  // namespace deep_ep::python
