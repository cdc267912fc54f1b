#include "verify/compare.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstring>

#include "verify/payload.hpp"

namespace deep_ep::verify {
namespace {

std::string describe_element(DType dtype, const std::byte* element) {
  std::string hex;
  for (std::size_t i = size_of(dtype); i-- > 0;)
    hex += fmt::format("{:02x}", std::to_integer<unsigned>(element[i]));
  return fmt::format("{:.9g} (0x{})", element_value(dtype, element), hex);
}

}  // namespace

void Comparator::mismatch(std::string text) {
  if (result_.first_mismatch.empty())
    result_.first_mismatch = stage_.empty() ? std::move(text) : stage_ + ": " + text;
}

void Comparator::expect(bool holds, std::string_view what) {
  ++result_.checked_elements;
  if (holds) return;
  ++result_.wrong_elements;
  mismatch(fmt::format("does not hold: {}", what));
}

bool Comparator::shape(std::string_view name, const TensorView& tensor, DType dtype,
                       const std::vector<std::int64_t>& shape) {
  ++result_.checked_outputs;
  ++result_.checked_elements;
  bool same = tensor.ndim == static_cast<int>(shape.size()) && tensor.dtype == dtype &&
              tensor.is_contiguous();
  for (std::size_t i = 0; same && i < shape.size(); ++i) same = tensor.shape[i] == shape[i];
  if (same) return true;
  ++result_.wrong_elements;
  mismatch(fmt::format("{} is {}, expected contiguous {}[{}]", name,
                       tensor.defined() ? tensor.describe() : "undefined", to_string(dtype),
                       fmt::join(shape, ", ")));
  return false;
}

void Comparator::rows(std::string_view name, const TensorView& tensor, const RowCheck& check) {
  if (check.rows == 0) return;
  const std::size_t size = size_of(tensor.dtype);
  const std::size_t columns = static_cast<std::size_t>(tensor.numel() / tensor.shape[0]);
  std::vector<std::byte> want(columns * size);
  result_.checked_elements += check.rows * static_cast<std::int64_t>(columns);
  for (std::int64_t row = 0; row < check.rows; ++row) {
    check.fill(row, want.data());
    const std::byte* got =
        tensor.as<const std::byte>() + static_cast<std::size_t>(row) * want.size();
    if (std::memcmp(got, want.data(), want.size()) == 0) continue;
    for (std::size_t i = 0; i < want.size(); i += size) {
      if (std::memcmp(got + i, want.data() + i, size) == 0) continue;
      ++result_.wrong_elements;
      if (!result_.first_mismatch.empty()) continue;
      const std::string origin = check.origin ? check.origin(row) : std::string();
      mismatch(fmt::format("{}[{}, {}]{} is {}, expected {}", name, row, i / size, origin,
                           describe_element(tensor.dtype, got + i),
                           describe_element(tensor.dtype, want.data() + i)));
    }
  }
}

void Comparator::elements(std::string_view name, const TensorView& tensor, const void* want,
                          std::int64_t count) {
  const std::size_t size = size_of(tensor.dtype);
  const auto* got = tensor.as<const std::byte>();
  const auto* expected = static_cast<const std::byte*>(want);
  const std::int64_t columns = tensor.ndim == 2 ? tensor.shape[1] : 1;
  result_.checked_elements += count;
  for (std::int64_t i = 0; i < count; ++i, got += size, expected += size) {
    if (std::memcmp(got, expected, size) == 0) continue;
    ++result_.wrong_elements;
    if (!result_.first_mismatch.empty()) continue;
    const std::string index =
        tensor.ndim == 2 ? fmt::format("{}, {}", i / columns, i % columns) : fmt::format("{}", i);
    mismatch(fmt::format("{}[{}] is {}, expected {}", name, index,
                         describe_element(tensor.dtype, got),
                         describe_element(tensor.dtype, expected)));
  }
}

}  // namespace deep_ep::verify
