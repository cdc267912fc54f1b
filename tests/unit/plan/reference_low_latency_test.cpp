#include "plan/reference_low_latency.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "deep_ep/error.hpp"
#include "plan/numerics.hpp"
#include "unit/plan/bytes.hpp"

// Low-latency exchanges that were worked out by hand.
namespace deep_ep::plan::reference {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

std::vector<std::byte> bf16(const std::vector<float>& values) {
  std::vector<std::uint16_t> bits;
  for (const float value : values) bits.push_back(from_float<Bfloat16>(value).bits);
  return bytes_of(bits);
}

std::vector<float> floats(const std::vector<std::byte>& array) {
  std::vector<float> values;
  for (const std::uint16_t bits : values_of<std::uint16_t>(array))
    values.push_back(to_float(Bfloat16{bits}));
  return values;
}

/// Two ranks with experts 0, 1 and 2, 3; top-3. Rank 0 has three tokens, the last of which goes
/// nowhere; rank 1 has one that names expert 1 twice.
struct SmallExchange {
  LowLatencyShape shape{.num_topk = 3, .num_experts = 4, .num_ranks = 2, .x_bytes = 2};
  std::vector<DispatchInput> inputs = {
      {.num_tokens = 3,
       .x = bytes_of<std::uint16_t>({10, 11, 12}),
       .topk_idx = {1, 3, 0, 0, -1, 2, -1, -1, -1},
       .topk_weights = {0.5f, 0.25f, 2.0f, 4.0f, 9.0f, 0.125f, 9.0f, 9.0f, 9.0f}},
      {.num_tokens = 1,
       .x = bytes_of<std::uint16_t>({20}),
       .topk_idx = {1, 0, 1},
       .topk_weights = {0.75f, 2.0f, 0.5f}},
  };
};

TEST(ReferenceLowLatency, ExpertsHaveTheirRowsInSourceAndTokenOrder) {
  const SmallExchange exchange;
  const auto received = low_latency_dispatch(exchange.shape, 8, exchange.inputs);
  ASSERT_EQ(received.size(), 2u);
  ASSERT_EQ(received[0].groups.size(), 2u);
  EXPECT_THAT(values_of<std::uint16_t>(received[0].groups[0].x), ElementsAre(10, 11, 20));
  EXPECT_THAT(received[0].groups[0].src_rank, ElementsAre(0, 0, 1));
  EXPECT_THAT(received[0].groups[0].src_idx, ElementsAre(0, 1, 0));
  EXPECT_THAT(values_of<std::uint16_t>(received[0].groups[1].x), ElementsAre(10, 20))
      << "the token that names expert 1 twice has one row there";
  constexpr std::int64_t kBegin = std::int64_t{1} << 32;
  EXPECT_THAT(received[0].layout_range, ElementsAre(2, 2 * kBegin | 1, 1, kBegin | 1));
  EXPECT_THAT(values_of<std::uint16_t>(received[1].groups[0].x), ElementsAre(11));
  EXPECT_THAT(values_of<std::uint16_t>(received[1].groups[1].x), ElementsAre(10));
  EXPECT_THAT(received[1].layout_range, ElementsAre(1, kBegin, 1, kBegin));
  EXPECT_THAT(received[0].groups[0].topk_idx, IsEmpty());
}

TEST(ReferenceLowLatency, RankMajorRowsCarryTheirLocalExperts) {
  SmallExchange exchange;
  exchange.shape.rank_major = true;
  const auto received = low_latency_dispatch(exchange.shape, 8, exchange.inputs);
  ASSERT_EQ(received[0].groups.size(), 2u);
  const LowLatencyGroup& first = received[0].groups[0];
  EXPECT_THAT(values_of<std::uint16_t>(first.x), ElementsAre(10, 11));
  EXPECT_THAT(first.topk_idx, ElementsAre(1, -1, 0, 0, -1, -1));
  EXPECT_THAT(first.topk_weights, ElementsAre(0.5f, 0.0f, 2.0f, 4.0f, 0.0f, 0.0f));
  EXPECT_THAT(received[0].groups[1].topk_idx, ElementsAre(1, 0, 1));
  EXPECT_THAT(received[0].layout_range, ElementsAre(2, std::int64_t{8} << 32 | 1));
  EXPECT_THAT(received[1].groups[1].src_idx, IsEmpty());
  EXPECT_THAT(received[1].layout_range, ElementsAre(2, std::int64_t{8} << 32));
}

TEST(ReferenceLowLatency, CombineWeightsExpertsAndAddsRanks) {
  const SmallExchange exchange;
  const auto received = low_latency_dispatch(exchange.shape, 8, exchange.inputs);
  const std::vector<LowLatencyCombineInput> inputs = {
      {exchange.inputs[0].topk_idx,
       exchange.inputs[0].topk_weights,
       {bf16({1, 2, 3}), bf16({10, 20})}},
      {exchange.inputs[1].topk_idx, exchange.inputs[1].topk_weights, {bf16({100}), bf16({400})}}};
  const auto combined = low_latency_combine(exchange.shape, 1, received, inputs);
  // Token 0: 2 * 1 + 0.5 * 10 at rank 0, 0.25 * 400 at rank 1; token 1: 4 * 2 and 0.125 * 100,
  // 8 + 12.5; token 2 went nowhere.
  EXPECT_THAT(floats(combined[0]), ElementsAre(107, 20.5f, 0));
  // 2 * 3 + (0.75 + 0.5) * 20
  EXPECT_THAT(floats(combined[1]), ElementsAre(31));
}

TEST(ReferenceLowLatency, EachRanksSumIsRoundedBeforeItTravels) {
  LowLatencyShape shape{.num_topk = 4, .num_experts = 4, .num_ranks = 2, .x_bytes = 1};
  const std::vector<DispatchInput> inputs = {
      {.num_tokens = 1, .x = bytes_of<std::uint8_t>({1}), .topk_idx = {0, 1, 2, 3}},
      {.num_tokens = 0}};
  const auto received = low_latency_dispatch(shape, 1, inputs);
  // 256 + 1 is halfway between two bfloat16 numbers; 256 + 1 + 1 is one.
  const std::vector<LowLatencyCombineInput> outputs = {
      {inputs[0].topk_idx, {1, 1, 1, 1}, {bf16({256}), bf16({1})}},
      {{}, {}, {bf16({1}), bf16({0})}}};
  EXPECT_THAT(floats(low_latency_combine(shape, 1, received, outputs)[0]), ElementsAre(256));
}

TEST(ReferenceLowLatency, OtherWiresQuantiseEachRanksSum) {
  LowLatencyShape shape{.num_topk = 2, .num_experts = 2, .num_ranks = 2, .x_bytes = 1};
  const std::vector<DispatchInput> inputs = {
      {.num_tokens = 1, .x = bytes_of<std::uint8_t>({1}), .topk_idx = {0, 1}}, {.num_tokens = 0}};
  const auto received = low_latency_dispatch(shape, 1, inputs);
  const auto first_values = [&](WireFormat wire, const std::vector<float>& values) {
    std::vector<float> row = values;
    row.resize(kWireGroup, 0.0f);
    shape.wire = wire;
    const auto combined =
        low_latency_combine(shape, kWireGroup, received,
                            {{inputs[0].topk_idx, {1, 1}, {bf16(row)}}, {{}, {}, {bf16(row)}}});
    std::vector<float> found = floats(combined[0]);
    EXPECT_EQ(found.back(), 0.0f);
    found.resize(values.size());
    return found;
  };
  EXPECT_THAT(first_values(WireFormat::kBfloat16, {448, -17, 3}), ElementsAre(896, -34, 6));
  // 17 is halfway between 16 and 18.
  EXPECT_THAT(first_values(WireFormat::kFp8, {448, -17, 3}), ElementsAre(896, -32, 6));
  // 510 steps over 16 octaves: 3 is step 305.5 of them, and 306 is 3.0314.
  EXPECT_THAT(first_values(WireFormat::kLogFmt, {256, -0x1p-8f, 3}),
              ElementsAre(512, -0x1p-7f, 6.0625f));
}

TEST(ReferenceLowLatency, QuantisedRowsHaveAScaleForEachGroup) {
  std::vector<float> values(256, 0.0f);
  values[3] = -896.0f;
  values[4] = 2.0f;
  values[200] = 3.0f;
  const QuantizedRow row = quantize_row(bf16(values), LowLatencyScales::kFloat32);
  EXPECT_THAT(values_of<float>(row.scales), ElementsAre(2.0f, divide(3.0f, 448.0f)));
  EXPECT_EQ(to_float(Float8E4m3{std::to_integer<std::uint8_t>(row.x[3])}), -448.0f);
  EXPECT_EQ(to_float(Float8E4m3{std::to_integer<std::uint8_t>(row.x[4])}), 1.0f);
  EXPECT_EQ(to_float(Float8E4m3{std::to_integer<std::uint8_t>(row.x[200])}), 448.0f);
  EXPECT_THAT(values_of<float>(quantize_row(bf16(values), LowLatencyScales::kPowerOfTwo).scales),
              ElementsAre(2.0f, 0.0078125f));
  EXPECT_THAT(values_of<std::uint8_t>(quantize_row(bf16(values), LowLatencyScales::kUe8m0).scales),
              ElementsAre(128, 120, 0, 0));
}

TEST(ReferenceLowLatency, ExpertsOutOfRangeAreRefused) {
  SmallExchange exchange;
  exchange.inputs[0].topk_idx[1] = 4;
  EXPECT_THROW(low_latency_dispatch(exchange.shape, 8, exchange.inputs), Error);
}

}  // namespace
}  // namespace deep_ep::plan::reference
