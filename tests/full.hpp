#pragma once

#include <cstdlib>

namespace deep_ep::test {

/// `./dev test --full`: the long form of what has one.
inline bool wants_full() { return std::getenv("DEEP_EP_TEST_FULL") != nullptr; }

}  // namespace deep_ep::test
