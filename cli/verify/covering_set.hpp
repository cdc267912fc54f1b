#pragma once

#include <vector>

#include "verify/case.hpp"

namespace deep_ep::verify {

/// Small cases that together touch every kind of payload, routing and call. Neighbours differ in
/// shape, so that running them on one Buffer alternates shapes.
std::vector<Case> covering_set(int ranks, std::uint64_t seed);

}  // namespace deep_ep::verify
