#include "allocator.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>

#include <cstdio>
#include <map>
#include <mutex>

#include "arrays.hpp"
#include "torch_calls.hpp"

namespace deep_ep::python {

namespace {

/// The Buffer whose call asks for mapped memory on this thread.
thread_local Buffer* asking = nullptr;

class Asking {
 public:
  explicit Asking(Buffer* buffer) : before_(asking) { asking = buffer; }
  ~Asking() { asking = before_; }
  Asking(const Asking&) = delete;
  Asking& operator=(const Asking&) = delete;

 private:
  Buffer* before_;
};

/// What torch holds: a piece of a segment for each piece of its pools. Outlives every Buffer, since
/// torch gives memory back when it likes, also at the end of the process.
struct Held {
  std::mutex mutex;
  std::map<void*, Tensor> pieces;
};
Held& held() {
  static auto* all = new Held;
  return *all;
}

bool is_held(const void* data, std::int64_t bytes) {
  const std::lock_guard lock(held().mutex);
  auto piece = held().pieces.upper_bound(const_cast<void*>(data));
  if (piece == held().pieces.begin()) return false;
  --piece;
  return static_cast<const std::byte*>(data) + bytes <=
         static_cast<const std::byte*>(piece->first) + piece->second.nbytes();
}

/// What this thread takes from torch meanwhile comes from a pool; the GIL is held.
class InPool {
 public:
  explicit InPool(nb::handle pool) : pool_(pool) { call(1); }
  ~InPool() {
    for (const int end : {2, 3}) {
      try {
        call(end);
      } catch (nb::python_error& error) {
        error.discard_as_unraisable("deep_ep: the end of an allocation");
      }
    }
  }
  InPool(const InPool&) = delete;
  InPool& operator=(const InPool&) = delete;

 private:
  void call(int function) const {
    PyObject* done = PyObject_CallObject(PyTuple_GetItem(pool_.ptr(), function),
                                         PyTuple_GetItem(pool_.ptr(), 4));
    if (done == nullptr) throw nb::python_error();
    Py_DECREF(done);
  }

  nb::handle pool_;
};

}  // namespace

TorchAllocator::TorchAllocator(nb::callable allocate, std::optional<int> device,
                               std::optional<nb::tuple> pool, std::optional<nb::callable> stream)
    : allocate_(std::move(allocate)), device_(device) {
  if (pool) pool_.emplace(std::move(*pool));
  if (stream) stream_.emplace(std::move(*stream));
}

Stream TorchAllocator::current_stream() const {
  if (!stream_) return {};
  Stream stream{nullptr, {DeviceType::kCuda, *device_}};
  const TorchCalls* torch = TorchCalls::get();
  if (torch == nullptr || !torch->current_stream(*device_, &stream.native))
    stream.native = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(stream_->get()()));
  return stream;
}

std::shared_ptr<void> TorchAllocator::allocate(std::int64_t bytes, bool mapped,
                                               const CallOptions& options) {
  // Only the callable tells torch of a second stream.
  const bool one_stream = !options.previous_event.has_value() && !options.async_finish;
  if (one_stream && device_ && (!mapped || pool_)) {
    if (std::shared_ptr<void> block = allocate_by_torch(bytes, mapped, options.stream))
      return block;
  }
  return ask(bytes, mapped, options);
}

std::shared_ptr<void> TorchAllocator::allocate_by_torch(std::int64_t bytes, bool mapped,
                                                        Stream stream) const {
  const TorchCalls* torch = TorchCalls::get();
  if (torch == nullptr) return nullptr;
  if (!mapped) return torch->allocate(bytes, *device_);
  const nb::gil_scoped_acquire gil;
  const nb::handle pool = pool_->get();
  const bool surely_not = *device_ >= 0 && torch->is_outside_capture(stream.native);
  if (!surely_not && nb::cast<bool>(nb::handle(PyTuple_GetItem(pool.ptr(), 0))())) return nullptr;
  const Asking here(buffer_);
  const InPool in_pool(pool);
  std::shared_ptr<void> block = torch->allocate(bytes, *device_);
  return block && is_held(block.get(), bytes) ? block : nullptr;
}

std::shared_ptr<void> TorchAllocator::ask(std::int64_t bytes, bool mapped,
                                          const CallOptions& options) const {
  const nb::gil_scoped_acquire gil;
  const Asking here(mapped ? buffer_ : nullptr);
  nb::object given =
      allocate_.get()(bytes, mapped, options.previous_event.has_value(), options.async_finish);
  if (given.is_none()) return nullptr;
  const auto parts = nb::cast<nb::tuple>(given);
  auto* data = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(parts[0]));
  // In a capture torch may take a pool of the graph's rather than ours; then the Buffer's own
  // memory serves, which stays with the graph as well.
  if (mapped && !is_held(data, bytes)) return nullptr;
  return {data, ObjectOwner{Reference(nb::borrow(parts[1]))}};
}

void bind_allocator(nb::module_& module) {
  nb::class_<TorchAllocator>(module, "Allocator")
      .def(nb::init<nb::callable, std::optional<int>, std::optional<nb::tuple>,
                    std::optional<nb::callable>>(),
           nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none() = nb::none());
}

}  // namespace deep_ep::python

extern "C" {

__attribute__((visibility("default"))) void* deep_ep_torch_alloc(std::ptrdiff_t size,
                                                                 int /*device*/, void* /*stream*/) {
  using namespace deep_ep::python;
  if (asking == nullptr || size <= 0) return nullptr;
  try {
    deep_ep::Tensor piece = asking->allocate_mapped(size);
    void* data = piece.data;
    const std::lock_guard lock(held().mutex);
    held().pieces.emplace(data, std::move(piece));
    return data;
  } catch (const std::exception& error) {
    // torch makes an out-of-memory error of its own of it, which has no room for a reason.
    std::fprintf(stderr, "deep_ep: %s\n", error.what());
    return nullptr;
  }
}

__attribute__((visibility("default"))) void deep_ep_torch_free(void* data, std::ptrdiff_t /*size*/,
                                                               int device, void* stream) {
  using namespace deep_ep::python;
  deep_ep::Tensor piece;
  {
    const std::lock_guard lock(held().mutex);
    const auto found = held().pieces.find(data);
    if (found == held().pieces.end()) return;
    piece = std::move(found->second);
    held().pieces.erase(found);
  }
  piece.release({stream, {deep_ep::DeviceType::kCuda, device}});
}
}
