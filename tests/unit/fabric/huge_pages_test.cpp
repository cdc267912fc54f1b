#include "fabric/huge_pages.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>

#include "fabric/socket.hpp"

namespace deep_ep::fabric {
namespace {

std::int64_t address_space_kib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmSize:")) return std::stoll(line.substr(7));
  return -1;
}

TEST(HugePages, MappingsAreAlignedWholeAndLeaveNothingBeside) {
  for (const std::int64_t bytes : {std::int64_t{4096}, kHugePage, 3 * kHugePage + 4096}) {
    const Fd file(memfd_create("deep_ep_test", MFD_CLOEXEC));
    ASSERT_EQ(ftruncate(file.get(), bytes), 0);
    const std::int64_t before = address_space_kib();
    std::byte* base = map_aligned(bytes, MAP_SHARED, file.get());
    ASSERT_NE(base, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(base) % kHugePage, 0u);
    std::memset(base, 0x5a, bytes);
    use_huge_pages(base, bytes);
    for (std::int64_t i = 0; i < bytes; i += 512) ASSERT_EQ(base[i], std::byte{0x5a});
    munmap(base, bytes);
    EXPECT_LE(address_space_kib() - before, 64);
  }
}

TEST(HugePages, AFailedMappingIsNullWithErrno) {
  errno = 0;
  EXPECT_EQ(map_aligned(4096, MAP_SHARED, -1), nullptr);
  EXPECT_EQ(errno, EBADF);
}

}  // namespace
}  // namespace deep_ep::fabric
