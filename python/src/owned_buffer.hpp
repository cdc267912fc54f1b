#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "allocator.hpp"
#include "deep_ep/buffer.hpp"
#include "references.hpp"

namespace deep_ep::python {

using NoGil = nb::gil_scoped_release;

/// A Buffer that lets others run while it is made and destroyed.
class OwnedBuffer {
 public:
  OwnedBuffer(std::shared_ptr<Bootstrap> bootstrap, BufferOptions options,
              const std::shared_ptr<TorchAllocator>& allocator) {
    options.allocator = allocator;
    const NoGil no_gil;
    buffer_ = std::make_unique<Buffer>(std::move(bootstrap), options);
    if (allocator) allocator->set_buffer(buffer_.get());
    allocator_ = allocator;
  }
  ~OwnedBuffer() {
    const NoGil no_gil;
    buffer_.reset();
  }
  OwnedBuffer(const OwnedBuffer&) = delete;
  OwnedBuffer& operator=(const OwnedBuffer&) = delete;

  Buffer& get() { return *buffer_; }
  /// What the calling thread works on: the current stream of a GPU, as torch has it.
  Stream current_stream() const { return allocator_ ? allocator_->current_stream() : Stream{}; }

 private:
  std::unique_ptr<Buffer> buffer_;
  std::shared_ptr<TorchAllocator> allocator_;
};

}  // namespace deep_ep::python
