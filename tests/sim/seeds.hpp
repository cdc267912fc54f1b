#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "full.hpp"

namespace deep_ep::sim {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::uint64_t kFewer = 4;  // other orders hardly touch other memory
#else
constexpr std::uint64_t kFewer = 1;
#endif

/// Calls `run(seed)` for seeds 1..count, or for DEEP_EP_SIM_SEED alone, up to the first that fails,
/// and prints how to repeat that one. Under AddressSanitizer for a quarter of them, but with
/// DEEP_EP_TEST_FULL. Returns of how many.
template <class Run>
std::uint64_t for_each_seed(std::uint64_t count, Run&& run) {
  if (!test::wants_full()) count = (count + kFewer - 1) / kFewer;
  const char* only = std::getenv("DEEP_EP_SIM_SEED");
  const std::uint64_t first = only != nullptr ? std::strtoull(only, nullptr, 10) : 1;
  const std::uint64_t last = only != nullptr ? first : count;
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    try {
      run(seed);
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
    }
    if (!testing::Test::HasFailure()) continue;
    const testing::TestInfo& test = *testing::UnitTest::GetInstance()->current_test_info();
    std::printf("failed with seed %llu; repeat: ./dev sim --seed %llu --gtest_filter=%s.%s\n",
                static_cast<unsigned long long>(seed), static_cast<unsigned long long>(seed),
                test.test_suite_name(), test.name());
    return seed - first + 1;
  }
  std::printf("seeds %llu to %llu\n", static_cast<unsigned long long>(first),
              static_cast<unsigned long long>(last));
  return last - first + 1;
}

}  // namespace deep_ep::sim
