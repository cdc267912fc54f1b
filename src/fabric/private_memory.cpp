#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "base/error.hpp"
#include "fabric/available_memory.hpp"
#include "fabric/huge_pages.hpp"
#include "fabric/memory.hpp"

namespace deep_ep::fabric {
namespace {

class PrivateMapping final : public Mapping {
 public:
  PrivateMapping(std::byte* base, std::int64_t bytes) : base_(base), bytes_(bytes) {}
  ~PrivateMapping() override { munmap(base_, static_cast<std::size_t>(bytes_)); }
  PrivateMapping(const PrivateMapping&) = delete;
  PrivateMapping& operator=(const PrivateMapping&) = delete;

  std::byte* base() const override { return base_; }
  std::int64_t bytes() const override { return bytes_; }

 private:
  std::byte* base_;
  std::int64_t bytes_;
};

/// A shortage is an Error here, not the end of the process when it writes.
void populate(std::byte* base, std::int64_t bytes) {
  if (madvise(base, static_cast<std::size_t>(bytes), MADV_POPULATE_WRITE) == 0) return;
  const int error = errno;
  // Kernels before 5.14 do not know it.
  if (error != EINVAL) throw_shortage(bytes, std::generic_category().message(error));
  const std::int64_t page = sysconf(_SC_PAGESIZE);
  for (std::int64_t i = 0; i < bytes; i += page) base[i] = std::byte{0};
}

}  // namespace

std::shared_ptr<Mapping> allocate_private(std::int64_t bytes) {
  require(bytes > 0, "bytes: {} is not allowed, must be positive", bytes);
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  require_available(bytes, bytes);
  std::byte* base = map_aligned(bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  if (base == nullptr) throw_shortage(bytes, std::generic_category().message(errno));
  auto mapping = std::make_shared<PrivateMapping>(base, bytes);
  // Best effort: the machine may forbid it.
  madvise(mapping->base(), static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
  populate(mapping->base(), bytes);
  return mapping;
}

}  // namespace deep_ep::fabric
