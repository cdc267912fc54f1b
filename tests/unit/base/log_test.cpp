#include "base/log.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace deep_ep {
namespace {

namespace fs = std::filesystem;

/// What a fresh process, which has read no variable yet, writes to its log file.
std::string log_of_child(const std::string& level, const std::function<void()>& body,
                         pid_t* child_pid = nullptr) {
  char pattern[] = "/tmp/deep_ep_log_XXXXXX";
  const fs::path directory = mkdtemp(pattern);
  const pid_t pid = fork();
  if (pid == 0) {
    setenv("DEEP_EP_LOG_LEVEL", level.c_str(), 1);
    setenv("DEEP_EP_LOG_FILE", (directory / "rank.%p.%h").c_str(), 1);
    body();
    _exit(0);
  }
  waitpid(pid, nullptr, 0);
  if (child_pid != nullptr) *child_pid = pid;
  char host[256] = {};
  gethostname(host, sizeof(host) - 1);
  std::ifstream file(directory / ("rank." + std::to_string(pid) + "." + host));
  std::stringstream text;
  text << file.rdbuf();
  fs::remove_all(directory);
  return text.str();
}

TEST(Log, LinesCarryTimeLevelAndPidInTheFileOfTheProcess) {
  pid_t pid = 0;
  const std::string text = log_of_child(
      "debug", [] { log::debug("{} of {}", 3, 4); }, &pid);
  const std::string line =
      "[0-9-]+ [0-9:]+\\.[0-9]+ \\[debug\\] deep_ep\\[" + std::to_string(pid) + "\\] 3 of 4\n";
  EXPECT_THAT(text, ::testing::MatchesRegex(line));
}

TEST(Log, LevelHidesWhatIsBelowIt) {
  const std::string text = log_of_child("warn", [] {
    log::debug("hidden");
    log::info("hidden");
    log::warn("shown");
  });
  EXPECT_THAT(text, ::testing::EndsWith("] shown\n"));
  EXPECT_THAT(text, ::testing::Not(::testing::HasSubstr("hidden")));
  EXPECT_EQ(log_of_child("off", [] { log::write(log::Level::kError, "x"); }), "");
}

TEST(Log, UnknownLevelCountsAsWarn) {
  const std::string text = log_of_child("loud", [] {
    log::info("hidden");
    log::warn("shown");
  });
  EXPECT_THAT(text, ::testing::EndsWith("] shown\n"));
}

}  // namespace
}  // namespace deep_ep
