#pragma once

#include <cstdint>

#include "base/portable.hpp"

// Callers' arrays as kernels read them.
namespace deep_ep::cuda {

/// A matrix whose element [i, j] lies at i * row_stride + j * column_stride elements.
struct StridedWords {
  const std::uint32_t* data = nullptr;  // null: none
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 0;
};

/// Ids of either width.
struct Ids {
  const void* data = nullptr;  // [N, K]; null: none
  bool wide = false;           // int64 rather than int32

  DEEP_EP_HD std::int64_t operator[](std::int64_t i) const {
    return wide ? static_cast<const std::int64_t*>(data)[i]
                : static_cast<const std::int32_t*>(data)[i];
  }
};

}  // namespace deep_ep::cuda
