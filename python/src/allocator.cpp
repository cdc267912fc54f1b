#include "allocator.hpp"

#include <cstdio>
#include <map>
#include <mutex>

#include "arrays.hpp"

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

}  // namespace

std::shared_ptr<void> ObjectAllocator::allocate(std::int64_t bytes, bool mapped,
                                                const CallOptions& options) {
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
