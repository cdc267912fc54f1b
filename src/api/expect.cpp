#include "api/expect.hpp"

#include <algorithm>
#include <string>

#include "base/error.hpp"

namespace deep_ep {

namespace {

std::string dtype_list(std::initializer_list<DType> dtypes) {
  std::string text;
  for (const DType dtype : dtypes)
    text += fmt::format("{}{}", text.empty() ? "" : " or ", to_string(dtype));
  return text;
}

std::string shape_text(std::initializer_list<std::int64_t> shape) {
  std::string text;
  for (const std::int64_t size : shape) {
    text += fmt::format("{}{}", text.empty() ? "" : ", ", size < 0 ? "any" : std::to_string(size));
  }
  return "[" + text + "]";
}

}  // namespace

void expect(const TensorView& tensor, const Expected& expected) {
  const std::string_view name = expected.name;
  require(tensor.defined(), "{} is missing; a tensor {} {} is needed", name,
          dtype_list(expected.dtypes), shape_text(expected.shape));
  require(std::find(expected.dtypes.begin(), expected.dtypes.end(), tensor.dtype) !=
              expected.dtypes.end(),
          "{} is {}, its dtype must be {}", name, tensor.describe(), dtype_list(expected.dtypes));
  bool fits = tensor.ndim == static_cast<int>(expected.shape.size());
  for (int i = 0; fits && i < tensor.ndim; ++i) {
    const std::int64_t want = expected.shape.begin()[i];
    fits = tensor.shape[i] >= 0 && (want < 0 || tensor.shape[i] == want);
  }
  require(fits, "{} is {}, its shape must be {}", name, tensor.describe(),
          shape_text(expected.shape));
  require(tensor.data != nullptr || tensor.numel() == 0, "{} is {} with a null pointer", name,
          tensor.describe());
  require(!expected.contiguous || tensor.is_contiguous(), "{} is {}, it must be contiguous", name,
          tensor.describe());
  require(tensor.device == expected.device, "{} is on {} {}, the Buffer is on {} {}", name,
          to_string(tensor.device.type), tensor.device.index, to_string(expected.device.type),
          expected.device.index);
}

std::int64_t row_bytes(const TensorView& x) {
  return x.shape[1] * static_cast<std::int64_t>(size_of(x.dtype));
}

void expect_rows(const TensorView& x, const Expected& expected) {
  expect(x, expected);
  require(x.shape[1] > 0 && row_bytes(x) % 16 == 0,
          "x is {}: its rows have {} bytes, must be a positive multiple of 16", x.describe(),
          row_bytes(x));
  require(x.shape[0] <= INT32_MAX, "x is {}: at most 2^31 - 1 rows are allowed", x.describe());
}

}  // namespace deep_ep
