#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include <Eigen/Core>

// The model: a text's bytes become vectors, and a few mixture-of-experts layers change them.
// Nothing in this file knows about ranks. The distributed layer (distributed.cpp) and the one that
// checks it (one_process.cpp) are both made of these functions.
namespace moe {

// One token a row, as the library wants it: row-major [tokens, values].
using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Bf16Rows = Eigen::Matrix<Eigen::bfloat16, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using IdRows = Eigen::Matrix<std::int64_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

struct ModelShape {
  int hidden = 256;        ///< values of a token
  int intermediate = 512;  ///< values inside an expert
  int experts = 16;        ///< of each layer
  int topk = 4;            ///< experts that a token visits
  int layers = 2;
  std::uint64_t seed = 1;  ///< of all weights
};

/// One expert: y = silu(x * up) * down.
struct Expert {
  Rows up;    ///< [hidden, intermediate]
  Rows down;  ///< [intermediate, hidden]
};

struct Layer {
  Rows gate;                    ///< [hidden, experts]
  std::vector<Expert> experts;  ///< the ones asked for, ascending
  int topk = 0;
};

/// Which experts each token visits, and how much each counts.
struct Choices {
  IdRows experts;  ///< [tokens, topk]
  Rows weights;    ///< [tokens, topk], each row sums to 1
};

/// Layer number `index` with its experts first .. first + count - 1. Weights depend on the shape
/// and on (index, expert) only, so that whoever makes an expert makes the same one.
Layer make_layer(const ModelShape& shape, int index, int first, int count);

/// The vectors of the bytes text[first, first + count): a random vector for each byte value, mixed
/// with those of the bytes before it and with the position, so that no two tokens are alike.
Rows embed(const ModelShape& shape, std::string_view text, std::int64_t first, std::int64_t count);

/// What a layer reads: each row scaled to mean square 1, rounded to BF16.
Bf16Rows normalise(const Rows& x);

/// The gating network: softmax over all experts, the topk largest, weights renormalised. Bitwise
/// the same for a token whatever other tokens are in `x`.
Choices choose_experts(const Layer& layer, const Bf16Rows& x);

/// One expert on many rows, in fp32. Bitwise the same for a row whatever the other rows are.
Rows run_expert(const Expert& expert, const Rows& x);

/// A view of Choices, or of what a rank received: -1 marks an expert that is not in the list.
struct ChoicesView {
  Eigen::Map<const IdRows> experts;
  Eigen::Map<const Rows> weights;
};
ChoicesView view(const Choices& choices);

/// For each row of `x` the weighted sum of the outputs of those `experts` that it chose, in fp32
/// and ascending order; ids count from experts[0]. If `magnitude` is given, it gets the sums of the
/// absolute values of the same terms.
Rows sum_of_experts(std::span<const Expert> experts, const ChoicesView& choices,
                    Eigen::Map<const Bf16Rows> x, Rows* magnitude = nullptr);

}  // namespace moe
