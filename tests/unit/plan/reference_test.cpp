#include "plan/reference.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "deep_ep/error.hpp"
#include "plan/numerics.hpp"
#include "unit/plan/bytes.hpp"

// Exchanges that were worked out by hand.
namespace deep_ep::plan::reference {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

/// Two ranks, four experts, top-2. Rank 0 has three tokens, the last of which goes nowhere; rank 1
/// has one that names expert 1 twice.
struct SmallExchange {
  DispatchShape shape{.num_topk = 2,
                      .num_experts = 4,
                      .num_ranks = 2,
                      .x_bytes = 2,
                      .scale_bytes = 1,
                      .expert_alignment = 4};
  std::vector<DispatchInput> inputs = {
      {.num_tokens = 3,
       .x = bytes_of<std::uint16_t>({10, 11, 12}),
       .scales = bytes_of<std::uint8_t>({100, 101, 102}),
       .topk_idx = {0, 3, 2, -1, -1, -1},
       .topk_weights = {0.5f, 0.25f, 2.0f, 9.0f, 9.0f, 9.0f}},
      {.num_tokens = 1,
       .x = bytes_of<std::uint16_t>({20}),
       .scales = bytes_of<std::uint8_t>({200}),
       .topk_idx = {1, 1},
       .topk_weights = {0.75f, 0.125f}},
  };
  std::vector<std::int64_t> num_tokens = {3, 1};
};

TEST(ReferenceDispatch, RowsComeInSourceAndTokenOrderWithLocalExperts) {
  const SmallExchange exchange;
  const std::vector<DispatchOutput> outputs = dispatch(exchange.shape, exchange.inputs);
  ASSERT_EQ(outputs.size(), 2u);

  EXPECT_EQ(outputs[0].num_rows, 2);
  EXPECT_THAT(values_of<std::uint16_t>(outputs[0].x), ElementsAre(10, 20));
  EXPECT_THAT(values_of<std::uint8_t>(outputs[0].scales), ElementsAre(100, 200));
  EXPECT_THAT(outputs[0].src_rank, ElementsAre(0, 1));
  EXPECT_THAT(outputs[0].src_idx, ElementsAre(0, 0));
  EXPECT_THAT(outputs[0].topk_idx, ElementsAre(0, -1, 1, 1));
  EXPECT_THAT(outputs[0].topk_weights, ElementsAre(0.5f, 0.0f, 0.75f, 0.125f));
  EXPECT_THAT(outputs[0].num_tokens_per_local_expert, ElementsAre(4, 4));
  EXPECT_THAT(outputs[0].rank_prefix_matrix, ElementsAre(1, 2, 2, 2));

  EXPECT_EQ(outputs[1].num_rows, 2);
  EXPECT_THAT(values_of<std::uint16_t>(outputs[1].x), ElementsAre(10, 11));
  EXPECT_THAT(outputs[1].src_idx, ElementsAre(0, 1));
  EXPECT_THAT(outputs[1].topk_idx, ElementsAre(-1, 1, 0, -1));
  EXPECT_THAT(outputs[1].topk_weights, ElementsAre(0.0f, 0.25f, 2.0f, 0.0f));
  EXPECT_THAT(outputs[1].rank_prefix_matrix, ElementsAre(1, 2, 2, 2));
}

TEST(ReferenceDispatch, EntriesAreCountedAndRoundedUpPerExpert) {
  SmallExchange exchange;
  exchange.shape.expert_alignment = 1;
  std::vector<DispatchOutput> outputs = dispatch(exchange.shape, exchange.inputs);
  EXPECT_THAT(outputs[0].num_tokens_per_local_expert, ElementsAre(1, 2)) << "a duplicate counts";
  EXPECT_THAT(outputs[1].num_tokens_per_local_expert, ElementsAre(1, 1));
  exchange.inputs[0].topk_idx = {-1, -1, -1, -1, -1, -1};
  exchange.shape.expert_alignment = 128;
  outputs = dispatch(exchange.shape, exchange.inputs);
  EXPECT_THAT(outputs[0].num_tokens_per_local_expert, ElementsAre(0, 128));
  EXPECT_THAT(outputs[1].num_tokens_per_local_expert, ElementsAre(0, 0)) << "none stay none";
}

TEST(ReferenceDispatch, BadInputIsRefused) {
  SmallExchange exchange;
  exchange.inputs[1].topk_idx = {1, 4};
  EXPECT_THROW(dispatch(exchange.shape, exchange.inputs), Error);
  exchange.inputs[1].topk_idx = {1};
  EXPECT_THROW(dispatch(exchange.shape, exchange.inputs), Error);
  exchange = SmallExchange();
  exchange.shape.num_experts = 5;
  EXPECT_THROW(dispatch(exchange.shape, exchange.inputs), Error);
}

/// Rows of one bfloat16 value each.
std::vector<std::byte> bfloat16s(const std::vector<float>& values) {
  std::vector<std::uint16_t> codes;
  for (const float value : values) codes.push_back(from_float<Bfloat16>(value).bits);
  return bytes_of(codes);
}

std::vector<float> floats(const std::vector<std::byte>& bfloat16s) {
  const auto codes = values_of<std::uint16_t>(bfloat16s);
  std::vector<float> values(codes.size());
  for (std::size_t i = 0; i < codes.size(); ++i) values[i] = to_float(Bfloat16{codes[i]});
  return values;
}

TEST(ReferenceCombine, SumsRowsOfATokenOverItsRanks) {
  const SmallExchange exchange;
  const auto routing = dispatch(exchange.shape, exchange.inputs);
  std::vector<CombineInput> inputs(2);
  inputs[0].x = bfloat16s({1.0f, 2.0f});  // token 0 of rank 0, token 0 of rank 1
  inputs[1].x = bfloat16s({4.0f, 8.0f});  // tokens 0 and 1 of rank 0
  inputs[0].topk_weights = {1.0f, 2.0f, 3.0f, 4.0f};
  inputs[1].topk_weights = {5.0f, 6.0f, 7.0f, 8.0f};
  const auto outputs = combine(DType::kBfloat16, 1, 2, routing, exchange.num_tokens, inputs);
  EXPECT_THAT(floats(outputs[0].x), ElementsAre(5.0f, 8.0f, 0.0f));
  EXPECT_THAT(floats(outputs[1].x), ElementsAre(2.0f));
  EXPECT_THAT(outputs[0].topk_weights, ElementsAre(6.0f, 8.0f, 7.0f, 8.0f, 0.0f, 0.0f));
  EXPECT_THAT(outputs[1].topk_weights, ElementsAre(3.0f, 4.0f));
}

TEST(ReferenceCombine, BiasesComeAfterTheRowsAndReachTokensThatWentNowhere) {
  const SmallExchange exchange;
  const auto routing = dispatch(exchange.shape, exchange.inputs);
  std::vector<CombineInput> inputs(2);
  inputs[0].x = bfloat16s({1.0f, -0.0f});
  inputs[1].x = bfloat16s({4.0f, 8.0f});
  inputs[0].bias[0] = bfloat16s({0.5f, 0.25f, 3.0f});
  inputs[0].bias[1] = bfloat16s({16.0f, 16.0f, 16.0f});
  const auto outputs = combine(DType::kBfloat16, 1, 2, routing, exchange.num_tokens, inputs);
  EXPECT_THAT(floats(outputs[0].x), ElementsAre(21.5f, 24.25f, 19.0f));
  EXPECT_THAT(outputs[0].topk_weights, IsEmpty());
  EXPECT_EQ(values_of<std::uint16_t>(outputs[1].x)[0], 0) << "+0 plus -0 is +0";
}

/// One token whose row on rank i is terms[i].
std::vector<float> sum_of(const std::vector<float>& terms) {
  const int num_ranks = static_cast<int>(terms.size());
  const DispatchShape shape{
      .num_topk = num_ranks, .num_experts = num_ranks, .num_ranks = num_ranks, .x_bytes = 4};
  std::vector<DispatchInput> tokens(num_ranks);
  std::vector<std::int64_t> num_tokens(num_ranks, 0);
  tokens[0].num_tokens = num_tokens[0] = 1;
  tokens[0].x.resize(4);
  for (int rank = num_ranks - 1; rank >= 0; --rank) tokens[0].topk_idx.push_back(rank);
  std::vector<CombineInput> inputs(num_ranks);
  for (int rank = 0; rank < num_ranks; ++rank) inputs[rank].x = bytes_of<float>({terms[rank]});
  const auto outputs =
      combine(DType::kFloat32, 1, num_ranks, dispatch(shape, tokens), num_tokens, inputs);
  return values_of<float>(outputs[0].x);
}

TEST(ReferenceCombine, RanksAreSummedInAscendingOrder) {
  const float tiny = std::ldexp(1.0f, -24);  // lost beside 1, unless it comes twice before
  EXPECT_THAT(sum_of({1.0f, tiny, tiny}), ElementsAre(1.0f));
  EXPECT_THAT(sum_of({tiny, tiny, 1.0f}), ElementsAre(1.0f + 2 * tiny));
}

TEST(ReferenceCombine, NanResultsAreCanonical) {
  const auto sum = sum_of({INFINITY, -INFINITY});
  EXPECT_EQ(bytes_of(sum), bytes_of<std::uint32_t>({0x7fffffff}));
}

TEST(ReferenceCombine, SumsAreRoundedOnceAtTheEnd) {
  const SmallExchange exchange;
  const auto routing = dispatch(exchange.shape, exchange.inputs);
  std::vector<CombineInput> inputs(2);
  // 256 + 1 is a tie in bfloat16 and would fall back to 256; with the bias it is not.
  inputs[0].x = bfloat16s({256.0f, 0.0f});
  inputs[1].x = bfloat16s({1.0f, 0.0f});
  inputs[0].bias[0] = bfloat16s({0.5f, 0.0f, 0.0f});
  const auto outputs = combine(DType::kBfloat16, 1, 2, routing, exchange.num_tokens, inputs);
  EXPECT_THAT(floats(outputs[0].x), ElementsAre(258.0f, 0.0f, 0.0f));
}

TEST(ReferenceCombine, OpaqueRowsAndShortInputsAreRefused) {
  const SmallExchange exchange;
  const auto routing = dispatch(exchange.shape, exchange.inputs);
  std::vector<CombineInput> inputs(2);
  inputs[0].x = inputs[1].x = bfloat16s({1.0f, 1.0f});
  EXPECT_NO_THROW(combine(DType::kFloat16, 1, 2, routing, exchange.num_tokens, inputs));
  EXPECT_THROW(combine(DType::kUint8, 1, 2, routing, exchange.num_tokens, inputs), Error);
  inputs[1].x.pop_back();
  EXPECT_THROW(combine(DType::kFloat16, 1, 2, routing, exchange.num_tokens, inputs), Error);
}

TEST(ReferenceGroups, AnExpertTwiceIsOneRowWithBothWeights) {
  const SmallExchange exchange;
  const std::vector<DispatchOutput> outputs = dispatch(exchange.shape, exchange.inputs);
  // Rank 0 has experts 0 and 1: token 0 of rank 0 for 0, the token of rank 1 for 1.
  const RowGroups groups = group_rows(outputs[0], 2, 2, 4);
  EXPECT_THAT(groups.group_offsets, ElementsAre(0, 4, 8));
  EXPECT_THAT(groups.grouped_rows, ElementsAre(0, -1, 4, 4));
  EXPECT_THAT(groups.recv_rows, ElementsAre(0, -1, -1, -1, 1, -1, -1, -1));
  EXPECT_THAT(groups.weights, ElementsAre(0.5f, 0, 0, 0, 0.875f, 0, 0, 0));
}

TEST(ReferenceGroups, RowsAreSummedInOrderAndRoundedOnce) {
  GroupedInput input;
  input.recv_rows = {1, -1, 0, 1};
  input.weights = {3.0f, 9.0f, 2.0f, 5.0f};
  input.x = bytes_of<float>({10, 1000, 20, 30});
  EXPECT_THAT(values_of<float>(reduce_rows(DType::kFloat32, 1, 3, input)),
              ElementsAre(40.0f, 180.0f, 0.0f));
  input.weights = {};
  EXPECT_THAT(values_of<float>(reduce_rows(DType::kFloat32, 1, 3, input)),
              ElementsAre(20.0f, 40.0f, 0.0f));
  // 1 + 2^-24 is 1 in fp32, and so once more; the other way round the small ones add up.
  const float small = std::ldexp(1.0f, -24);
  GroupedInput ordered{bytes_of<float>({1, small, small}), {0, 0, 0}, {}};
  EXPECT_THAT(values_of<float>(reduce_rows(DType::kFloat32, 1, 1, ordered)), ElementsAre(1.0f));
  ordered.x = bytes_of<float>({small, small, 1});
  EXPECT_THAT(values_of<float>(reduce_rows(DType::kFloat32, 1, 1, ordered)),
              ElementsAre(1.0f + 2 * small));
}

}  // namespace
}  // namespace deep_ep::plan::reference
