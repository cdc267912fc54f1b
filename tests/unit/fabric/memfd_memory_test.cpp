#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "deep_ep/error.hpp"
#include "fabric/memory.hpp"
#include "fabric/socket.hpp"
#include "refusal.hpp"

namespace deep_ep::fabric {
namespace {

using ::testing::HasSubstr;

long open_files() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {});
}

TEST(MemfdMemory, IsZeroedAndRoundedUpToPages) {
  const auto memory = make_memfd_memory();
  const auto mapping = memory->allocate(5000);
  EXPECT_EQ(mapping->bytes() % sysconf(_SC_PAGESIZE), 0);
  EXPECT_GE(mapping->bytes(), 5000);
  EXPECT_TRUE(std::all_of(mapping->base(), mapping->base() + mapping->bytes(),
                          [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST(MemfdMemory, ShortageIsAnErrorWithSizes) {
  const auto memory = make_memfd_memory();
  const std::int64_t bytes = std::int64_t{1} << 50;
  const std::string text = refusal([&] { memory->allocate(bytes); }, ErrorCode::kOutOfMemory);
  EXPECT_THAT(text, HasSubstr("1125899906842624 bytes"));
  EXPECT_THAT(text, HasSubstr("leaves "));
}

TEST(MemfdMemory, RefusesNothingAndNegative) {
  const auto memory = make_memfd_memory();
  refusal([&] { memory->allocate(0); }, ErrorCode::kInvalidArgument);
  refusal([&] { memory->allocate(-1); }, ErrorCode::kInvalidArgument);
}

TEST(MemfdMemory, RanksOfOneProcessShareOneMappingWithoutTheFile) {
  const auto memory = make_memfd_memory();
  const auto other = make_memfd_memory();
  const auto own = memory->allocate(4096);
  Descriptor descriptor = memory->describe(*own);
  const Fd fd(descriptor.fd);
  descriptor.fd = -1;
  EXPECT_EQ(other->map(descriptor)->base(), own->base());
}

TEST(MemfdMemory, AnotherProcessMapsTheSameBytes) {
  const auto memory = make_memfd_memory();
  Descriptor descriptor;
  {
    // Gone here, so that the child below cannot find the mapping and must use the file.
    const auto own = memory->allocate(8192);
    std::memset(own->base(), 7, 8192);
    descriptor = memory->describe(*own);
  }
  const Fd fd(descriptor.fd);
  const pid_t pid = fork();
  if (pid == 0) {
    const auto mapping = make_memfd_memory()->map(descriptor);
    const bool same = mapping->base()[8191] == std::byte{7};
    mapping->base()[0] = std::byte{9};
    _exit(same ? 0 : 1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(memory->map(descriptor)->base()[0], std::byte{9});
}

TEST(MemfdMemory, NoFileOrAForeignFileIsRefused) {
  const auto memory = make_memfd_memory();
  Descriptor descriptor;
  {
    const auto own = memory->allocate(4096);
    descriptor = memory->describe(*own);
  }
  const Fd fd(descriptor.fd);
  descriptor.fd = -1;
  EXPECT_THAT(refusal([&] { memory->map(descriptor); }, ErrorCode::kInvalidArgument),
              HasSubstr("without a file descriptor"));
  const Fd unsealed(memfd_create("unsealed", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(unsealed.get(), 4096), 0);
  descriptor.fd = unsealed.get();
  EXPECT_THAT(refusal([&] { memory->map(descriptor); }, ErrorCode::kInvalidArgument),
              HasSubstr("not sealed"));
}

TEST(MemfdMemory, LeavesNoFileOpen) {
  const long before = open_files();
  {
    const auto memory = make_memfd_memory();
    const auto own = memory->allocate(4096);
    const Fd fd(memory->describe(*own).fd);
    EXPECT_GT(open_files(), before);
  }
  EXPECT_EQ(open_files(), before);
}

}  // namespace
}  // namespace deep_ep::fabric
