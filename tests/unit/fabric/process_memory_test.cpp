#include "fabric/process_memory.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <numeric>
#include <vector>

namespace deep_ep::fabric {
namespace {

using ::testing::HasSubstr;

/// A process that shows its beacon and some rows, and waits to be killed.
class Neighbour {
 public:
  static constexpr int kValues = 5000;
  struct Shown {
    Beacon::Sight sight;
    const std::int32_t* values;  // 0, 1, 2, ...
  };

  Neighbour() {
    int ends[2];
    if (pipe(ends) != 0) return;
    pid_ = fork();
    if (pid_ == 0) serve(ends[1]);
    close(ends[1]);
    const Fd in(ends[0]);
    EXPECT_EQ(::read(in.get(), &shown, sizeof shown), static_cast<ssize_t>(sizeof shown));
  }
  ~Neighbour() { end(); }
  Neighbour(const Neighbour&) = delete;
  Neighbour& operator=(const Neighbour&) = delete;

  void end() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

  Shown shown{};

 private:
  [[noreturn]] static void serve(int out) {
    const Beacon beacon;
    std::vector<std::int32_t> values(kValues);
    std::iota(values.begin(), values.end(), 0);
    const Shown mine{beacon.sight(), values.data()};
    if (write(out, &mine, sizeof mine) != static_cast<ssize_t>(sizeof mine)) _exit(1);
    for (;;) pause();
  }

  pid_t pid_ = -1;
};

TEST(ProcessMemory, OwnProcessIsKnownAsSuch) {
  const Beacon beacon;
  ProcessMemory memory;
  ASSERT_EQ(memory.open(beacon.sight()), "");
  EXPECT_TRUE(memory.is_own());
  EXPECT_TRUE(memory.alive());
}

TEST(ProcessMemory, AnotherProcessIsReadAndMissedWhenItEnds) {
  Neighbour neighbour;
  ProcessMemory memory;
  const std::string why = memory.open(neighbour.shown.sight);
  if (why.find("process_vm_readv") != std::string::npos) GTEST_SKIP() << why;
  ASSERT_EQ(why, "");
  EXPECT_FALSE(memory.is_own());
  std::vector<std::int32_t> values(Neighbour::kValues, -1);
  const std::size_t bytes = values.size() * sizeof values[0];
  ASSERT_EQ(memory.read(values.data(), neighbour.shown.values, bytes), 0);
  for (int i = 0; i < Neighbour::kValues; ++i) ASSERT_EQ(values[i], i);
  EXPECT_TRUE(memory.alive());

  neighbour.end();
  EXPECT_EQ(memory.read(values.data(), neighbour.shown.values, bytes), ESRCH);
  EXPECT_FALSE(memory.alive());
}

TEST(ProcessMemory, AProcessWithOtherWordsIsRefused) {
  const Beacon beacon;
  Beacon::Sight sight = beacon.sight();
  sight.words[1] ^= 1;
  ProcessMemory memory;
  EXPECT_THAT(memory.open(sight), HasSubstr("is another one here"));
}

TEST(ProcessMemory, AProcessThatIsNotThereIsRefused) {
  Neighbour neighbour;
  neighbour.end();
  ProcessMemory memory;
  EXPECT_THAT(memory.open(neighbour.shown.sight), HasSubstr("pidfd_open"));
}

TEST(ProcessMemory, UnreadableMemoryIsAnErrorAlsoBehindReadableOne) {
  const Beacon beacon;
  ProcessMemory memory;
  ASSERT_EQ(memory.open(beacon.sight()), "");
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* mapped =
      mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(mapped, MAP_FAILED);
  auto* pages = static_cast<std::byte*>(mapped);
  std::memset(pages, 7, page);
  ASSERT_EQ(mprotect(pages + page, page, PROT_NONE), 0);
  std::vector<std::byte> to(2 * page);
  EXPECT_EQ(memory.read(to.data(), pages, page), 0);
  EXPECT_EQ(memory.read(to.data(), pages, 2 * page), EFAULT);
  EXPECT_EQ(memory.read(to.data(), pages + page, 1), EFAULT);
  EXPECT_EQ(memory.read(to.data(), pages, 0), 0);
  munmap(mapped, 2 * page);
}

}  // namespace
}  // namespace deep_ep::fabric
