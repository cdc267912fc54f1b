#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_ep::fabric {

constexpr std::int64_t kHugePage = 2 << 20;

/// mmap() of `bytes` readable and writable bytes at an address that a huge page may begin at; null,
/// with errno, if it fails.
std::byte* map_aligned(std::int64_t bytes, int flags, int fd);

/// Asks for huge pages under memory whose pages are all there. Best effort: not every kernel has
/// them. What it costs is about what filling the memory with zeros did.
void use_huge_pages(std::byte* base, std::int64_t bytes);

}  // namespace deep_ep::fabric
