#include "one_process.hpp"

#include <cmath>

namespace moe {

// One value of the layer is s = sum of w_k * f_k(h) over its K = topk experts; A is the sum of
// |w_k * f_k(h)|, and p_r the part of s whose experts live on rank r. The w_k and f_k(h) are
// bitwise the same in both layers: same inputs, same code, and an expert's result for a row does
// not depend on the batch. BF16 keeps 8 bits, so rounding to it changes v by at most b*|v|, b =
// 2^-8; fp32 keeps 24, u = 2^-24. The distributed layer
//   sums on each rank in fp32          K*u*A                  (a product and K - 1 additions)
//   rounds each partial p_r to BF16    b*A                    (the |p_r| add up to at most A)
//   adds the partials in fp32          K*u*A*(1 + b)          (at most K ranks take part)
//   rounds the sum to BF16             b*(|s| + b*A)          (the sum is at most that large)
// and this layer's own s is off by K*u*A. Second-order products are below a quarter of the fp32
// terms, which 4*K*u*A covers. The last summand is the rounding of values too small for a full
// mantissa. docs/numerics.md has the steps.
Expected run_layer_alone(const Layer& layer, const Rows& x) {
  constexpr float kBf16 = 0x1p-8f, kFp32 = 0x1p-24f, kTiny = 0x1p-120f;
  const Bf16Rows inputs = normalise(x);
  const Choices choices = choose_experts(layer, inputs);

  Expected expected;
  Rows magnitude;
  expected.sum = sum_of_experts(layer.experts, view(choices),
                                {inputs.data(), inputs.rows(), inputs.cols()}, &magnitude);
  const float per_magnitude =
      kBf16 * (1.0f + kBf16) + 4.0f * static_cast<float>(layer.topk) * kFp32;
  expected.bound = (per_magnitude * magnitude.array() + kBf16 * expected.sum.array().abs() + kTiny);
  return expected;
}

Difference compare(const Expected& expected, const Bf16Rows& actual) {
  Difference result{.values = actual.size()};
  for (Eigen::Index i = 0; i < actual.size(); ++i) {
    const float bound = expected.bound.data()[i];
    const float difference =
        std::fabs(static_cast<float>(actual.data()[i]) - expected.sum.data()[i]);
    // Written so that a NaN on either side counts as outside.
    const bool inside = std::isfinite(bound) && difference <= bound;
    if (!inside) ++result.outside;
    if (difference > result.largest || std::isnan(difference)) {
      result.largest = difference;
      result.allowed = bound;
    }
    result.closest = std::fmax(result.closest, difference / bound);
  }
  return result;
}

}  // namespace moe
