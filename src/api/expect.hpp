#pragma once

#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "deep_ep/tensor.hpp"

// What the checks of all calls' arguments have in common. They throw Error(kInvalidArgument).
namespace deep_ep {

/// What a tensor argument must look like; -1 in the shape allows any length.
struct Expected {
  std::string_view name;
  Device device;
  std::initializer_list<DType> dtypes;
  std::initializer_list<std::int64_t> shape;
  bool contiguous = true;
};

void expect(const TensorView& tensor, const Expected& expected);

std::int64_t row_bytes(const TensorView& x);

/// Rows whose size is a positive multiple of 16 bytes.
void expect_rows(const TensorView& x, const Expected& expected);

}  // namespace deep_ep
