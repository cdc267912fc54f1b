#pragma once

#include <string>
#include <vector>

namespace deep_ep::bench {

struct ProcessResult {
  int status = 0;  ///< exit status, or 128 + signal
  std::string output{};
  std::string errors{};
};

/// Runs a program found in PATH and collects what it prints.
ProcessResult run_process(const std::vector<std::string>& arguments);

}  // namespace deep_ep::bench
