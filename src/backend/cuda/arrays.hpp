#pragma once

#include <cstddef>
#include <cstdint>

#include "base/portable.hpp"
#include "plan/recv_arrays.hpp"

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

/// What a dispatch moves, of whatever mode, and where this rank's results lie.
struct DispatchStepArgs {
  const std::byte* x = nullptr;  // [N, x_bytes]
  StridedWords scales;           // [N, S]
  Ids topk_idx;                  // [N, K]
  const float* topk_weights = nullptr;
  plan::RowFormat format;
  int block_segment = 0;  // this rank's results
  std::int64_t block_offset = 0;
  std::int64_t block_rows = 0;
  int x_segment = -1;  // of rows of x that do not go to the block
  std::int64_t x_offset = 0;
  std::int64_t* wait_stats = nullptr;  // += [R] or null
};

}  // namespace deep_ep::cuda
