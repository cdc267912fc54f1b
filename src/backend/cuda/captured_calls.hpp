#pragma once

#include <functional>
#include <memory>

#include "backend/plugin.hpp"

namespace deep_ep::cuda {

/// As CudaParts::capture.
std::unique_ptr<CapturedCalls> capture(Stream stream, const std::function<void()>& calls);

}  // namespace deep_ep::cuda
