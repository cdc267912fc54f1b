#include "model.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace moe {
namespace {

enum class WeightKind : std::uint32_t { kEmbedding, kGate, kUp, kDown };

struct WeightName {
  WeightKind kind;
  int layer = 0;
  int expert = 0;
};

/// Uniform numbers of the given standard deviation. The standard fixes the output of seed_seq and
/// mt19937, not that of its distributions, hence the arithmetic by hand: every machine gets the
/// same.
Rows random_rows(std::uint64_t seed, WeightName name, Eigen::Index rows, Eigen::Index cols,
                 float deviation) {
  std::seed_seq sequence{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                         static_cast<std::uint32_t>(name.kind),
                         static_cast<std::uint32_t>(name.layer),
                         static_cast<std::uint32_t>(name.expert)};
  std::mt19937 generator(sequence);
  const float scale = deviation * std::sqrt(3.0f);
  Rows result(rows, cols);
  for (float& value : result.reshaped<Eigen::RowMajor>())
    value = scale * (static_cast<float>(generator() >> 8) * 0x1p-23f - 1.0f);
  return result;
}

/// The outputs of one expert have to be added to the rows that chose it.
struct ExpertBatch {
  std::vector<Eigen::Index> rows;
  std::vector<float> weights;
};

std::vector<ExpertBatch> group_by_expert(const ChoicesView& choices, std::size_t num_experts) {
  std::vector<ExpertBatch> batches(num_experts);
  for (Eigen::Index row = 0; row < choices.experts.rows(); ++row) {
    for (Eigen::Index k = 0; k < choices.experts.cols(); ++k) {
      const std::int64_t id = choices.experts(row, k);
      if (id < 0) continue;
      ExpertBatch& batch = batches.at(static_cast<std::size_t>(id));
      batch.rows.push_back(row);
      batch.weights.push_back(choices.weights(row, k));
    }
  }
  return batches;
}

}  // namespace

Layer make_layer(const ModelShape& shape, int index, int first, int count) {
  const float hidden = static_cast<float>(shape.hidden);
  const float intermediate = static_cast<float>(shape.intermediate);
  Layer layer{.gate = random_rows(shape.seed, {WeightKind::kGate, index}, shape.hidden,
                                  shape.experts, 2.0f / std::sqrt(hidden)),
              .experts = {},
              .topk = shape.topk};
  for (int id = first; id < first + count; ++id)
    layer.experts.push_back(
        {.up = random_rows(shape.seed, {WeightKind::kUp, index, id}, shape.hidden,
                           shape.intermediate, 1.0f / std::sqrt(hidden)),
         .down = random_rows(shape.seed, {WeightKind::kDown, index, id}, shape.intermediate,
                             shape.hidden, 2.0f / std::sqrt(intermediate))});
  return layer;
}

Rows embed(const ModelShape& shape, std::string_view text, std::int64_t first, std::int64_t count) {
  constexpr int kContext = 8;     // bytes that a token sees, its own included
  constexpr float kDecay = 0.6f;  // how much less each earlier byte counts
  constexpr float kPosition = 0.1f;
  const Rows table = random_rows(shape.seed, {WeightKind::kEmbedding}, 256, shape.hidden, 1.0f);
  Rows x(count, shape.hidden);
  for (std::int64_t token = 0; token < count; ++token) {
    const std::int64_t here = first + token;
    auto row = x.row(token);
    for (int i = 0; i < shape.hidden; ++i)
      row[i] = kPosition * std::sin(static_cast<float>(here) * 0.01f * static_cast<float>(i));
    float share = 1.0f;
    for (std::int64_t at = here; at >= 0 && at > here - kContext; --at, share *= kDecay)
      row += share * table.row(static_cast<unsigned char>(text[static_cast<std::size_t>(at)]));
  }
  return x;
}

Bf16Rows normalise(const Rows& x) {
  Bf16Rows result(x.rows(), x.cols());
  Eigen::RowVectorXf row;  // own memory: Eigen's sums depend on the alignment of what they read
  for (Eigen::Index token = 0; token < x.rows(); ++token) {
    row = x.row(token);
    const float mean_square = row.squaredNorm() / static_cast<float>(row.size());
    result.row(token) = (row / std::sqrt(mean_square + 1e-6f)).cast<Eigen::bfloat16>();
  }
  return result;
}

Choices choose_experts(const Layer& layer, const Bf16Rows& x) {
  Choices choices{IdRows(x.rows(), layer.topk), Rows(x.rows(), layer.topk)};
  Eigen::RowVectorXf row, probability;
  std::vector<Eigen::Index> order(static_cast<std::size_t>(layer.gate.cols()));
  for (Eigen::Index token = 0; token < x.rows(); ++token) {
    row = x.row(token).cast<float>();
    probability.noalias() = row * layer.gate;
    probability = (probability.array() - probability.maxCoeff()).exp();
    probability /= probability.sum();

    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + layer.topk, order.end(),
                      [&](Eigen::Index a, Eigen::Index b) {
                        return probability[a] != probability[b] ? probability[a] > probability[b]
                                                                : a < b;
                      });
    for (int k = 0; k < layer.topk; ++k) {
      choices.experts(token, k) = order[static_cast<std::size_t>(k)];
      choices.weights(token, k) = probability[order[static_cast<std::size_t>(k)]];
    }
    choices.weights.row(token) /= choices.weights.row(token).sum();
  }
  return choices;
}

Rows run_expert(const Expert& expert, const Rows& x) {
  // Products of one shape only: Eigen orders the sums of a product by its shape, so this is what
  // makes a row's bits independent of the batch (tested in model_test.cpp). Larger tiles are
  // faster, and waste more on an expert that few tokens chose.
  constexpr Eigen::Index kTile = 64;
  Rows y(x.rows(), expert.down.cols());
  Rows tile(kTile, x.cols()), inner(kTile, expert.up.cols()), outer(kTile, expert.down.cols());
  for (Eigen::Index first = 0; first < x.rows(); first += kTile) {
    const Eigen::Index count = std::min(kTile, x.rows() - first);
    tile.topRows(count) = x.middleRows(first, count);
    tile.bottomRows(kTile - count).setZero();
    inner.noalias() = tile * expert.up;
    inner.array() *= inner.array().logistic();
    outer.noalias() = inner * expert.down;
    y.middleRows(first, count) = outer.topRows(count);
  }
  return y;
}

ChoicesView view(const Choices& choices) {
  return {{choices.experts.data(), choices.experts.rows(), choices.experts.cols()},
          {choices.weights.data(), choices.weights.rows(), choices.weights.cols()}};
}

Rows sum_of_experts(std::span<const Expert> experts, const ChoicesView& choices,
                    Eigen::Map<const Bf16Rows> x, Rows* magnitude) {
  Rows sum = Rows::Zero(x.rows(), x.cols());
  if (magnitude) magnitude->setZero(x.rows(), x.cols());
  const std::vector<ExpertBatch> batches = group_by_expert(choices, experts.size());
  for (std::size_t id = 0; id < experts.size(); ++id) {
    const ExpertBatch& batch = batches[id];
    Rows inputs(static_cast<Eigen::Index>(batch.rows.size()), x.cols());
    for (std::size_t i = 0; i < batch.rows.size(); ++i)
      inputs.row(static_cast<Eigen::Index>(i)) = x.row(batch.rows[i]).cast<float>();
    const Rows outputs = run_expert(experts[id], inputs);
    for (std::size_t i = 0; i < batch.rows.size(); ++i) {
      const auto term = batch.weights[i] * outputs.row(static_cast<Eigen::Index>(i));
      sum.row(batch.rows[i]) += term;
      if (magnitude) magnitude->row(batch.rows[i]) += term.cwiseAbs();
    }
  }
  return sum;
}

}  // namespace moe
