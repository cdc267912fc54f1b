#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>

#include "deep_ep/tensor.hpp"

/// As describe() does it, but only when a text is made: calls check their arguments every time.
template <class Tensor>
struct fmt::formatter<Tensor, char,
                      std::enable_if_t<std::is_base_of_v<deep_ep::TensorView, Tensor>>>
    : fmt::formatter<std::string> {
  auto format(const deep_ep::TensorView& tensor, fmt::format_context& context) const {
    return fmt::formatter<std::string>::format(tensor.describe(), context);
  }
};

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
