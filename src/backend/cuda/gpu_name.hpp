#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "backend/cuda/check.hpp"
#include "fabric/socket.hpp"

namespace deep_ep::cuda {

/// A GPU's own name, the same for all processes that see it, whatever number it has there.
inline std::string gpu_name(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return fabric::to_hex({properties.uuid.bytes, sizeof properties.uuid.bytes});
}

}  // namespace deep_ep::cuda
