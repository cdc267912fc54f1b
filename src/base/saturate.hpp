#pragma once

#include <cstdint>

namespace deep_ep {

/// a * b of numbers that are not negative, at most 2^63 - 1.
inline std::int64_t saturated_product(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

}  // namespace deep_ep
