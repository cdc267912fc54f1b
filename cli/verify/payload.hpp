#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "deep_ep/types.hpp"

namespace deep_ep::verify {

/// Elements [first, first + count) of the row that `key` names. Never zero, never NaN or infinite
/// for bfloat16, float16, float32 (normal numbers of mixed sign whose exponents spread so far that
/// the order of a float32 sum shows in its bits); any non-zero bit pattern for the other types.
/// `first` is a multiple of 8.
void fill_row(std::uint64_t key, DType dtype, std::int64_t first, std::int64_t count,
              std::byte* out);

/// Positive normal float32, for weights and scales.
void fill_weights(std::uint64_t key, std::int64_t count, float* out);

/// The element as a number for messages; bytes as integers.
double element_value(DType dtype, const std::byte* element);

}  // namespace deep_ep::verify
