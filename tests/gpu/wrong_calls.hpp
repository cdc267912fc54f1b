#pragma once

#include <string>

#include "deep_ep/deep_ep.hpp"

// Calls in which an argument of the victim is wrong.
namespace deep_ep::test {

/// A dispatch: of "expert_id", "refused" or "capacity" what its name says.
void dispatch_wrongly(Buffer& buffer, const std::string& scenario, bool victim);
/// A low-latency dispatch with an expert that does not exist.
void low_latency_dispatch_wrongly(Buffer& buffer, bool victim);

}  // namespace deep_ep::test
