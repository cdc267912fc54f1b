#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "deep_ep/tensor.hpp"
#include "verify/case.hpp"

namespace deep_ep::verify {

/// Compares outputs bitwise with what they must be, and words the first difference.
class Comparator {
 public:
  explicit Comparator(CaseResult& result) : result_(result) {}

  /// Prefix of messages from here on, e.g. "cached dispatch 2".
  void set_stage(std::string stage) { stage_ = std::move(stage); }

  /// A fact that must hold; counts as one element.
  void expect(bool holds, std::string_view what);

  /// `tensor` must be contiguous with this dtype and shape. Returns false (and counts a wrong
  /// element) if it is not; its data must not be looked at then.
  bool shape(std::string_view name, const TensorView& tensor, DType dtype,
             const std::vector<std::int64_t>& shape);

  /// Rows [0, rows) of `tensor`. `fill(row, out)` writes the expected row; `origin(row)` says in
  /// words where it comes from and may be empty.
  struct RowCheck {
    std::int64_t rows = 0;
    std::function<void(std::int64_t row, std::byte* out)> fill;
    std::function<std::string(std::int64_t row)> origin;
  };
  void rows(std::string_view name, const TensorView& tensor, const RowCheck& check);

  /// The tensor's first elements against all of `want`.
  template <class T>
  void values(std::string_view name, const TensorView& tensor, const std::vector<T>& want) {
    elements(name, tensor, want.data(), static_cast<std::int64_t>(want.size()));
  }

 private:
  void elements(std::string_view name, const TensorView& tensor, const void* want,
                std::int64_t count);
  void mismatch(std::string text);

  CaseResult& result_;
  std::string stage_;
};

}  // namespace deep_ep::verify
