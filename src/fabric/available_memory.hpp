#pragma once

#include <cstdint>
#include <string>

namespace deep_ep::fabric {

/// What can be allocated before something of this machine or container is killed for it.
struct AvailableMemory {
  std::int64_t bytes = 0;
  std::string source;  ///< what sets the bound, for error texts
};

/// The smallest of MemAvailable and what the control groups (v1 or v2) of this process leave.
/// `root` is put before the paths read, for tests.
AvailableMemory available_memory(const std::string& root = "");

/// Throws Error(kOutOfMemory) unless `rest` bytes of an allocation of `bytes` bytes are available,
/// and some more for everybody else.
void require_available(std::int64_t bytes, std::int64_t rest);
/// Error(kOutOfMemory): why `bytes` bytes of memory cannot be had.
[[noreturn]] void throw_shortage(std::int64_t bytes, const std::string& why);

}  // namespace deep_ep::fabric
