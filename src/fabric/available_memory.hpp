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

}  // namespace deep_ep::fabric
