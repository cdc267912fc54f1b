#pragma once

#include <cstdint>

// All inline PTX: one instruction a function, with its memory order in its name where it has one.
namespace deep_ep::cuda {

/// Nanoseconds; one clock for all SMs, which advances in steps of up to 1 us.
__device__ __forceinline__ std::int64_t globaltimer() {
  std::int64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

}  // namespace deep_ep::cuda
