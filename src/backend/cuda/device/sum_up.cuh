#pragma once

#include <cstdint>

namespace deep_ep::cuda {

/// By a warp: body(i, value(i), their sum up to i, it included) for i < count; the whole sum.
template <class Value, class Body>
__device__ std::int64_t sum_up(int count, Value&& value, Body&& body) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  std::int64_t sum = 0;
  for (int base = 0; base < count; base += 32) {
    const int i = base + lane;
    const std::int64_t own = i < count ? value(i) : 0;
    std::int64_t upto = own;
    for (int step = 1; step < 32; step *= 2) {
      const std::int64_t before = __shfl_up_sync(0xffffffff, upto, step);
      if (lane >= step) upto += before;
    }
    upto += sum;
    if (i < count) body(i, own, upto);
    sum = __shfl_sync(0xffffffff, upto, 31);
  }
  return sum;
}

}  // namespace deep_ep::cuda
