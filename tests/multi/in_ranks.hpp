#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>

#include "deep_ep/bootstrap.hpp"

namespace deep_ep {

/// Runs `body` in `size` forked ranks; a failed expectation of a rank fails the test. No thread may
/// have been started in this process before.
inline std::vector<RankExit> exits_of_ranks(
    int size, const std::function<void(Bootstrap&)>& body,
    const std::function<void(std::span<const int>)>& started = {}) {
  return run_forked(
      size,
      [&](const std::shared_ptr<Bootstrap>& bootstrap) {
        body(*bootstrap);
        return ::testing::Test::HasFailure() ? 1 : 0;
      },
      started);
}

inline void in_ranks(int size, const std::function<void(Bootstrap&)>& body) {
  for (const RankExit& exit : exits_of_ranks(size, body))
    EXPECT_EQ(exit.status, 0) << "rank " << exit.rank;
}

}  // namespace deep_ep
