#include "model.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "one_process.hpp"

namespace moe {
namespace {

constexpr const char* kText = "Letters are sorted by the office that delivers them. ";

std::string long_text(std::size_t size) {
  std::string text;
  while (text.size() < size) text += kText;
  return text.substr(0, size);
}

Rows some_rows(const ModelShape& shape, std::int64_t count) {
  return embed(shape, long_text(static_cast<std::size_t>(count)), 0, count);
}

TEST(Embedding, DoesNotDependOnWhereTheTextIsCut) {
  const ModelShape shape{.hidden = 24};
  const std::string text = long_text(100);
  const Rows whole = embed(shape, text, 0, 100);
  EXPECT_EQ(embed(shape, text, 37, 41), whole.middleRows(37, 41));
}

TEST(Embedding, EqualBytesDiffer) {
  const Rows x = embed({}, "aaaaaaaaaaaaaaaaaaaaaaaa", 0, 24);
  for (int token = 1; token < 24; ++token) EXPECT_NE(x.row(token), x.row(token - 1));
}

TEST(Gate, WeightsArePositiveDescendAndSumToOne) {
  const ModelShape shape{.hidden = 64, .experts = 12, .topk = 5};
  const Choices choices =
      choose_experts(make_layer(shape, 0, 0, 0), normalise(some_rows(shape, 50)));
  for (int token = 0; token < 50; ++token) {
    EXPECT_NEAR(choices.weights.row(token).sum(), 1.0f, 1e-5f);
    EXPECT_GT(choices.weights(token, 4), 0.0f);
    for (int k = 1; k < 5; ++k) EXPECT_GE(choices.weights(token, k - 1), choices.weights(token, k));
  }
}

// The check of the demo rests on this and the next test: a rank sees other batches than the process
// that checks it.
TEST(Gate, BitsOfATokenDoNotDependOnTheBatch) {
  const ModelShape shape{.hidden = 40, .experts = 6, .topk = 3};
  const Layer layer = make_layer(shape, 0, 0, 0);
  const Rows x = some_rows(shape, 99);
  const Choices all = choose_experts(layer, normalise(x));
  for (const int first : {0, 1, 7, 50}) {
    const Choices part = choose_experts(layer, normalise(x.middleRows(first, 49)));
    EXPECT_EQ(part.experts, all.experts.middleRows(first, 49));
    EXPECT_EQ(part.weights, all.weights.middleRows(first, 49));
  }
}

TEST(Expert, BitsOfARowDoNotDependOnTheBatch) {
  for (const int hidden : {8, 72, 256}) {
    const ModelShape shape{.hidden = hidden, .intermediate = 2 * hidden + 3};
    const Layer layer = make_layer(shape, 0, 3, 1);
    const Rows x = some_rows(shape, 200);
    const Rows all = run_expert(layer.experts[0], x);
    for (const int first : {0, 1, 5, 63, 64, 130})
      EXPECT_EQ(run_expert(layer.experts[0], x.middleRows(first, 67)), all.middleRows(first, 67))
          << "hidden " << hidden << ", rows from " << first;
  }
}

TEST(Layer, PartsOfItsExpertsAddUpToTheWhole) {
  const ModelShape shape{.hidden = 32, .intermediate = 48, .experts = 8, .topk = 3};
  const Rows x = some_rows(shape, 90);
  const Bf16Rows inputs = normalise(x);
  const Layer whole = make_layer(shape, 1, 0, 8);
  Choices choices = choose_experts(whole, inputs);

  Rows sum = Rows::Zero(90, 32);
  for (int first = 0; first < 8; first += 2) {
    Choices local = choices;
    for (std::int64_t& id : local.experts.reshaped())
      id = id >= first && id < first + 2 ? id - first : -1;
    sum += sum_of_experts(make_layer(shape, 1, first, 2).experts, view(local),
                          {inputs.data(), 90, 32});
  }
  const Expected expected = run_layer_alone(whole, x);
  EXPECT_LT((sum - expected.sum).cwiseAbs().maxCoeff(), 1e-5f);
}

// What ranks compute, with roundings in the same places.
Bf16Rows layer_in_parts(const ModelShape& shape, const Rows& x, int ranks) {
  const Bf16Rows inputs = normalise(x);
  const Choices choices = choose_experts(make_layer(shape, 0, 0, 0), inputs);
  const int count = shape.experts / ranks;
  Rows sum = Rows::Zero(x.rows(), x.cols());
  for (int first = 0; first < shape.experts; first += count) {
    Choices local = choices;
    for (std::int64_t& id : local.experts.reshaped())
      id = id >= first && id < first + count ? id - first : -1;
    const Rows part = sum_of_experts(make_layer(shape, 0, first, count).experts, view(local),
                                     {inputs.data(), inputs.rows(), inputs.cols()});
    sum += part.cast<Eigen::bfloat16>().cast<float>();
  }
  return sum.cast<Eigen::bfloat16>();
}

TEST(Comparison, RoundingsOfTheRanksStayWithinTheBoundAndUseIt) {
  const ModelShape shape{.hidden = 64, .intermediate = 96};
  const Rows x = some_rows(shape, 300);
  const Expected expected = run_layer_alone(make_layer(shape, 0, 0, 16), x);
  for (const int ranks : {1, 2, 4, 8, 16}) {
    const Difference difference = compare(expected, layer_in_parts(shape, x, ranks));
    EXPECT_EQ(difference.outside, 0) << ranks << " ranks";
    EXPECT_GT(difference.closest, 0.3f) << ranks << " ranks: the bound is too loose to mean much";
  }
}

TEST(Comparison, SeesALostExpertSwappedRowsAndNonNumbers) {
  const ModelShape shape{.hidden = 64, .intermediate = 96};
  const Rows x = some_rows(shape, 300);
  Layer layer = make_layer(shape, 0, 0, 16);
  const Expected expected = run_layer_alone(layer, x);
  const Bf16Rows good = layer_in_parts(shape, x, 4);

  Bf16Rows wrong = good;
  wrong.row(7).swap(wrong.row(8));
  EXPECT_GT(compare(expected, wrong).outside, 100);

  wrong = good;
  wrong(299, 63) = std::numeric_limits<Eigen::bfloat16>::quiet_NaN();
  EXPECT_EQ(compare(expected, wrong).outside, 1);
  wrong(0, 0) = std::numeric_limits<Eigen::bfloat16>::infinity();
  EXPECT_EQ(compare(expected, wrong).outside, 2);

  layer.experts[5].down.setZero();
  EXPECT_GT(compare(run_layer_alone(layer, x), good).outside, 100);

  Expected broken = expected;
  broken.bound(3, 3) = std::numeric_limits<float>::infinity();
  EXPECT_EQ(compare(broken, good).outside, 1);
}

}  // namespace
}  // namespace moe
