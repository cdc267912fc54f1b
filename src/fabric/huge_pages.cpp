#include "fabric/huge_pages.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

namespace deep_ep::fabric {

std::byte* map_aligned(std::int64_t bytes, int flags, int fd) {
  const std::int64_t reserved = bytes + kHugePage;
  void* space = mmap(nullptr, static_cast<std::size_t>(reserved), PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(space);
  const std::int64_t before = -reinterpret_cast<std::intptr_t>(space) & (kHugePage - 1);
  void* mapped = mmap(begin + before, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                      flags | MAP_FIXED, fd, 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    munmap(space, static_cast<std::size_t>(reserved));
    errno = error;
    return nullptr;
  }
  if (before > 0) munmap(begin, static_cast<std::size_t>(before));
  // Whole pages: `bytes` may end within one.
  const std::int64_t page = sysconf(_SC_PAGESIZE);
  const std::int64_t end = (before + bytes + page - 1) / page * page;
  if (end < reserved) munmap(begin + end, static_cast<std::size_t>(reserved - end));
  return begin + before;
}

void use_huge_pages(std::byte* base, std::int64_t bytes) {
#if defined(MADV_COLLAPSE)
  constexpr int kCollapse = MADV_COLLAPSE;
#else
  constexpr int kCollapse = 25;  // since Linux 6.1
#endif
  const std::int64_t whole = bytes / kHugePage * kHugePage;
  if (whole == 0) return;
  madvise(base, static_cast<std::size_t>(whole), MADV_HUGEPAGE);
  // Also where the machine gives shared memory none by itself, which is what most do.
  madvise(base, static_cast<std::size_t>(whole), kCollapse);
}

}  // namespace deep_ep::fabric
