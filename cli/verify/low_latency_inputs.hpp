#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <initializer_list>

#include "verify/low_latency_expected.hpp"

namespace deep_ep::verify {

inline Tensor host_filled(DType dtype, std::initializer_list<std::int64_t> shape, int byte) {
  Tensor tensor = Tensor::empty(dtype, shape);
  std::memset(tensor.data, byte, tensor.nbytes());
  return tensor;
}

template <class T>
Tensor host_values(DType dtype, std::initializer_list<std::int64_t> shape, T value) {
  Tensor tensor = Tensor::empty(dtype, shape);
  std::fill_n(tensor.as<T>(), tensor.numel(), value);
  return tensor;
}

/// The arguments that one rank passes in one dispatch and the combines of it, on the host.
class LowLatencyInputs {
 public:
  LowLatencyInputs(const LowLatencyCase& c, const LowLatencyExpected& dispatched, int rank)
      : case_(c), rows_(c), dispatched_(dispatched), rank_(rank) {}

  Tensor x() const;
  Tensor scales() const;
  Tensor topk_idx() const;
  Tensor topk_weights() const;
  /// What the experts put out, for combine `round`. Rows that were not received are NaN, unless
  /// that is too much memory to touch: a combine that read them would show it.
  Tensor expert_rows(int round) const;

 private:
  Tensor make_rows(DType dtype, std::int64_t columns,
                   const std::function<std::vector<std::byte>(std::int64_t)>& make) const;
  std::int64_t tokens() const { return case_.tokens_of(rank_); }

  const LowLatencyCase& case_;
  LowLatencyRows rows_;
  const LowLatencyExpected& dispatched_;
  int rank_;
};

}  // namespace deep_ep::verify
