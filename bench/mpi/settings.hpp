#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deep_ep::bench {

struct Settings {
  std::int64_t tokens = 4096;
  std::int64_t hidden = 7168;
  int topk = 8;
  int experts = 256;
  int repeats = 11;
  std::uint64_t seed = 1;
  std::vector<int> ranks{2, 4};
  bool low_latency = false;
  std::string transport{};  ///< empty: measure all and take the fastest
  std::string json{};
};

}  // namespace deep_ep::bench
