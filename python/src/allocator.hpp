#pragma once

#include <nanobind/nanobind.h>

#include <optional>

#include "deep_ep/buffer.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// Memory of results from torch: by TorchCalls where that does, else, and where a second stream or
/// a capture has to be seen to, by a Python callable: allocate(bytes, mapped, previous_event given,
/// async_finish) returns None or (address, the object that owns it).
///
/// torch's pluggable allocator takes two C functions, `deep_ep_torch_alloc` and
/// `deep_ep_torch_free`, which know nothing of Buffers: while this one allocates `mapped` memory,
/// they take it from the Buffer that this thread calls.
class TorchAllocator final : public Allocator {
 public:
  /// `device`: CUDA device, -1 for the host; without one TorchCalls is not used. `pool`, a tuple:
  /// torch._C's functions is_capturing(), begin(device, id), end(device, id), release(device, id),
  /// and (device, id), by which memory comes from torch's pool over the Buffer's segments; without
  /// it the callable is asked for mapped memory. `stream`, of a GPU: a callable that tells the
  /// current stream, where TorchCalls does not.
  TorchAllocator(nb::callable allocate, std::optional<int> device, std::optional<nb::tuple> pool,
                 std::optional<nb::callable> stream);
  void set_buffer(Buffer* buffer) { buffer_ = buffer; }

  std::shared_ptr<void> allocate(std::int64_t bytes, bool mapped,
                                 const CallOptions& options) override;
  /// Of the calling thread, which has the GIL.
  Stream current_stream() const;

 private:
  std::shared_ptr<void> allocate_by_torch(std::int64_t bytes, bool mapped, Stream stream) const;
  std::shared_ptr<void> ask(std::int64_t bytes, bool mapped, const CallOptions& options) const;

  Reference allocate_;
  std::optional<int> device_;
  std::optional<Reference> pool_;
  std::optional<Reference> stream_;
  Buffer* buffer_ = nullptr;
};

void bind_allocator(nb::module_& module);

}  // namespace deep_ep::python
