#include "base/log.hpp"

#include <fcntl.h>
#include <fmt/chrono.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <climits>
#include <mutex>
#include <string>

#include "base/env.hpp"
#include "base/error.hpp"

namespace deep_ep::log {
namespace {

constexpr std::array<const char*, 6> kNames = {"trace", "debug", "info", "warn", "error", "off"};

// Logging happens in destructors and helper threads, so a bad level is a line, not an Error;
// whoever constructs a Buffer has read the variable before and got the Error.
Level level_from_environment() {
  try {
    const std::string name = env::log_level();
    for (std::size_t i = 0; i < kNames.size(); ++i) {
      if (name == kNames[i]) return static_cast<Level>(i);
    }
  } catch (const Error& error) {
    const std::string line = fmt::format("deep_ep: {}\n", error.what());
    (void)!::write(STDERR_FILENO, line.data(), line.size());
  }
  return Level::kWarn;
}

std::string expand(const std::string& pattern) {
  char host[HOST_NAME_MAX + 1] = "unknown";
  gethostname(host, sizeof(host) - 1);
  std::string path;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const char next = pattern[i] == '%' && i + 1 < pattern.size() ? pattern[i + 1] : '\0';
    if (next == 'p') {
      path += std::to_string(getpid());
    } else if (next == 'h') {
      path += host;
    } else {
      path += pattern[i];
      continue;
    }
    ++i;
  }
  return path;
}

/// Where lines go. A forked rank opens its own file, since the name may hold its pid.
int output() {
  static std::mutex mutex;
  static pid_t owner = 0;
  static int fd = STDERR_FILENO;
  const std::lock_guard lock(mutex);
  if (owner == getpid()) return fd;
  if (fd != STDERR_FILENO) close(fd);
  owner = getpid();
  fd = STDERR_FILENO;
  const std::string path = expand(env::log_file());
  if (path.empty()) return fd;
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (file >= 0) {
    fd = file;
  } else {
    const std::string line = fmt::format("deep_ep: DEEP_EP_LOG_FILE: cannot open '{}'\n", path);
    (void)!::write(STDERR_FILENO, line.data(), line.size());
  }
  return fd;
}

}  // namespace

bool enabled(Level level) {
  static const Level lowest = level_from_environment();
  return level >= lowest && level != Level::kOff;
}

void write(Level level, std::string_view text) {
  if (!enabled(level)) return;
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  tm local{};
  localtime_r(&now.tv_sec, &local);
  const std::string line =
      fmt::format("{:%Y-%m-%d %H:%M:%S}.{:06} [{}] deep_ep[{}] {}\n", local, now.tv_nsec / 1000,
                  kNames[static_cast<std::size_t>(level)], getpid(), text);
  // One call a line, appended: lines of several ranks do not mix.
  (void)!::write(output(), line.data(), line.size());
}

}  // namespace deep_ep::log
