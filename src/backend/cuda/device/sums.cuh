#pragma once

#include <cstdint>

#include "plan/numerics.hpp"

// Sums of rows in fp32 with the bits of plan/numerics.hpp: 16 bytes a step.
namespace deep_ep::cuda {

/// Elements of type T in 16 bytes, summed.
template <class T>
struct Sum16 {
  static constexpr int kCount = 16 / sizeof(T);
  float sums[kCount] = {};

  __device__ void add(const uint4& bytes) {
    const T* elements = reinterpret_cast<const T*>(&bytes);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = plan::add(sums[i], plan::to_float(elements[i]));
  }
  __device__ uint4 round() const {
    uint4 bytes;
    T* elements = reinterpret_cast<T*>(&bytes);
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = plan::from_float<T>(sums[i]);
    return bytes;
  }
};

}  // namespace deep_ep::cuda
