#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "verify/case.hpp"
#include "verify/compare.hpp"
#include "verify/covering_set.hpp"
#include "verify/expected.hpp"
#include "verify/payload.hpp"

namespace deep_ep::verify {
namespace {

using testing::HasSubstr;

std::vector<std::byte> row_of(std::uint64_t key, DType dtype, std::int64_t first,
                              std::int64_t count) {
  std::vector<std::byte> row(static_cast<std::size_t>(count) * size_of(dtype));
  fill_row(key, dtype, first, count, row.data());
  return row;
}

class EveryDtype : public testing::TestWithParam<DType> {};

TEST_P(EveryDtype, ElementsAreNeverZero) {
  const auto row = row_of(3, GetParam(), 0, 20000);
  const std::vector<std::byte> zero(size_of(GetParam()));
  for (std::size_t i = 0; i < row.size(); i += zero.size())
    ASSERT_NE(std::memcmp(row.data() + i, zero.data(), zero.size()), 0) << i;
}

TEST_P(EveryDtype, ABlockOfColumnsIsPartOfTheWholeRow) {
  const DType dtype = GetParam();
  const auto whole = row_of(5, dtype, 0, 64);
  const auto block = row_of(5, dtype, 24, 40);
  EXPECT_EQ(std::memcmp(whole.data() + 24 * size_of(dtype), block.data(), block.size()), 0);
}

TEST_P(EveryDtype, KeysGiveDifferentRows) {
  EXPECT_NE(row_of(5, GetParam(), 0, 16), row_of(6, GetParam(), 0, 16));
}

INSTANTIATE_TEST_SUITE_P(Payload, EveryDtype,
                         testing::Values(DType::kBfloat16, DType::kFloat16, DType::kFloat32,
                                         DType::kFloat8E4m3, DType::kUint8, DType::kInt32));

TEST(Payload, NumbersThatAreSummedAreFinite) {
  for (const DType dtype : {DType::kBfloat16, DType::kFloat16, DType::kFloat32}) {
    const auto row = row_of(9, dtype, 0, 20000);
    for (std::size_t i = 0; i < row.size(); i += size_of(dtype))
      ASSERT_TRUE(std::isnormal(element_value(dtype, row.data() + i)));
  }
}

// Else a backend that sums in another order would pass.
TEST(Payload, TheOrderOfAFloat32SumShowsInItsBits) {
  for (const DType dtype : {DType::kBfloat16, DType::kFloat16, DType::kFloat32}) {
    int different = 0;
    for (std::uint64_t key = 0; key < 1000; ++key) {
      const auto row = row_of(key, dtype, 0, 8);
      float up = 0, down = 0;
      for (std::size_t i = 0; i < 8; ++i) {
        up += static_cast<float>(element_value(dtype, row.data() + i * size_of(dtype)));
        down += static_cast<float>(element_value(dtype, row.data() + (7 - i) * size_of(dtype)));
      }
      different += up != down ? 1 : 0;
    }
    EXPECT_GT(different, 50) << to_string(dtype);
  }
}

TEST(Comparator, OneChangedBitIsOneWrongElementAndIsNamed) {
  Tensor tensor = Tensor::empty(DType::kBfloat16, {4, 16});
  Comparator::RowCheck check;
  check.rows = 4;
  check.fill = [](std::int64_t row, std::byte* out) {
    fill_row(static_cast<std::uint64_t>(row), DType::kBfloat16, 0, 16, out);
  };
  check.origin = [](std::int64_t) { return std::string(" (somewhere)"); };
  for (std::int64_t row = 0; row < 4; ++row) check.fill(row, tensor.as<std::byte>() + row * 32);
  tensor.as<std::uint16_t>()[2 * 16 + 5] ^= 1;
  CaseResult result;
  Comparator compare(result);
  compare.set_stage("dispatch");
  compare.rows("recv_x", tensor, check);
  EXPECT_EQ(result.wrong_elements, 1);
  EXPECT_EQ(result.checked_elements, 64);
  EXPECT_THAT(result.first_mismatch, HasSubstr("dispatch: recv_x[2, 5] (somewhere) is "));
}

TEST(Comparator, AWrongShapeIsNamedWithTheRightOne) {
  CaseResult result;
  Comparator compare(result);
  EXPECT_FALSE(
      compare.shape("recv_x", Tensor::empty(DType::kFloat32, {3, 8}), DType::kFloat32, {4, 8}));
  EXPECT_FALSE(result.passed());
  EXPECT_THAT(result.first_mismatch, HasSubstr("float32[4, 8]"));
}

TEST(Case, ImpossibleOnesAreRefusedByField) {
  const auto refused = [](auto change) {
    Case c;
    c.ranks = 2;
    change(c);
    try {
      validate(c);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("was not refused");
  };
  EXPECT_THAT(refused([](Case& c) { c.tokens = {1, 2, 3}; }), HasSubstr("tokens"));
  EXPECT_THAT(refused([](Case& c) { c.hidden = 7; }), HasSubstr("hidden = 7"));
  EXPECT_THAT(refused([](Case& c) { c.experts = 33; }), HasSubstr("experts = 33"));
  EXPECT_THAT(refused([](Case& c) { c.combine_dtype = DType::kUint8; }), HasSubstr("uint8"));
  EXPECT_THAT(refused([](Case& c) {
                c.num_worst_tokens = 5;
                c.pass_topk = false;
              }),
              HasSubstr("num_worst_tokens = 5"));
}

TEST(CoveringSet, EveryCaseIsPossibleForEveryNumberOfRanks) {
  for (int ranks = 1; ranks <= 16; ++ranks)
    for (const Case& c : covering_set(ranks, 1)) EXPECT_NO_THROW(validate(c)) << c.name;
}

TEST(RunCase, OneRankPassesTheCoveringSet) {
  Buffer buffer(bootstrap_threads(1)[0]);
  for (const Case& c : covering_set(1, 20)) {
    const CaseResult result = run_case(buffer, c);
    EXPECT_TRUE(result.passed()) << c.name << ": " << result.first_mismatch << "\n  "
                                 << c.describe();
    EXPECT_GT(result.checked_elements, 0) << c.name;
  }
}

}  // namespace
}  // namespace deep_ep::verify
