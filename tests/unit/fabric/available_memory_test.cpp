#include "fabric/available_memory.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

namespace deep_ep::fabric {
namespace {

namespace fs = std::filesystem;

/// A made-up machine in a folder.
class AvailableMemoryOf : public ::testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/deep_ep_machine_XXXXXX";
    root_ = mkdtemp(pattern);
    write("proc/meminfo", "MemTotal: 3000 kB\nMemAvailable:    2000 kB\n");
  }
  void TearDown() override { fs::remove_all(root_); }
  void write(const fs::path& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  AvailableMemory look() const { return available_memory(root_.string()); }

  fs::path root_;
};

TEST_F(AvailableMemoryOf, MachineWithoutLimitsIsMemAvailable) {
  EXPECT_EQ(look().bytes, 2000 * 1024);
  write("proc/self/cgroup", "0::/\n");
  write("sys/fs/cgroup/memory.max", "max\n");
  write("sys/fs/cgroup/memory.current", "5\n");
  EXPECT_EQ(look().bytes, 2000 * 1024);
}

TEST_F(AvailableMemoryOf, Version2CountsCacheAsFreeAndNamesTheGroup) {
  write("proc/self/cgroup", "0::/a/b\n");
  write("sys/fs/cgroup/a/b/memory.max", "1000000\n");
  write("sys/fs/cgroup/a/b/memory.current", "900000\n");
  write("sys/fs/cgroup/a/b/memory.stat", "anon 1\ninactive_file 2000\nactive_file 300\n");
  EXPECT_EQ(look().bytes, 102300);
  EXPECT_THAT(look().source, ::testing::HasSubstr("/a/b"));
}

TEST_F(AvailableMemoryOf, AncestorsBind) {
  write("proc/self/cgroup", "0::/a/b\n");
  write("sys/fs/cgroup/a/b/memory.max", "1000000\n");
  write("sys/fs/cgroup/a/b/memory.current", "0\n");
  write("sys/fs/cgroup/a/memory.max", "50000\n");
  write("sys/fs/cgroup/a/memory.current", "60000\n");
  EXPECT_EQ(look().bytes, 0);
}

TEST_F(AvailableMemoryOf, Version1InAContainerIsFoundAtTheMountsRoot) {
  write("proc/self/cgroup", "3:cpu:/docker/x\n2:hugetlb,memory:/docker/x\n");
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", "70000\n");
  write("sys/fs/cgroup/memory/memory.usage_in_bytes", "30000\n");
  write("sys/fs/cgroup/memory/memory.stat", "inactive_file 9\ntotal_inactive_file 1000\n");
  EXPECT_EQ(look().bytes, 41000);
}

TEST_F(AvailableMemoryOf, Version1WithoutALimitBindsNobodyThoughItCountsMoreCacheThanUsage) {
  write("proc/self/cgroup", "4:memory:/\n");
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  write("sys/fs/cgroup/memory/memory.usage_in_bytes", "30000\n");
  write("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 1000\ntotal_active_file 35000\n");
  EXPECT_EQ(look().bytes, 2000 * 1024);
}

TEST(AvailableMemory, ThisMachineHasSome) {
  EXPECT_GT(available_memory().bytes, 0);
  EXPECT_LT(available_memory().bytes, std::numeric_limits<std::int64_t>::max());
}

}  // namespace
}  // namespace deep_ep::fabric
