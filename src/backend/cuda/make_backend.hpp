#pragma once

#include <memory>

#include "backend/backend.hpp"

namespace deep_ep::cuda {

std::unique_ptr<Backend> make_backend(const BackendOptions& options);

}  // namespace deep_ep::cuda
