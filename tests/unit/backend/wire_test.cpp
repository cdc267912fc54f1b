#include "backend/host/wire.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "plan/numerics.hpp"

namespace deep_ep::host {
namespace {

using plan::WireFormat;
using plan::WireRow;
using Row = std::vector<std::uint16_t>;  // bfloat16

std::vector<float> values_of(const Row& row) {
  std::vector<float> values;
  for (const std::uint16_t bits : row) values.push_back(plan::to_float(plan::Bfloat16{bits}));
  return values;
}

/// What plan/numerics.hpp says that a receiver finds.
std::vector<float> through(WireFormat format, const Row& row) {
  std::vector<float> values = values_of(row);
  for (std::size_t at = 0; at < values.size(); at += plan::kWireGroup) {
    const auto each = [&](auto&& change) {
      for (std::size_t i = at; i < at + plan::kWireGroup; ++i) values[i] = change(values[i]);
    };
    float amax = 0.0f;
    float amin = std::numeric_limits<float>::infinity();
    float most = 0.0f;
    each([&](float value) {
      amax = plan::logfmt_amax(amax, value);
      amin = plan::logfmt_amin(amin, value);
      most = plan::fp8_amax(most, value);
      return value;
    });
    const plan::LogFmtScale scale = plan::logfmt_scale(plan::logfmt_range(amax, amin));
    const plan::Fp8Scale fp8 = plan::fp8_scale(most);
    each([&](float value) {
      return format == WireFormat::kLogFmt
                 ? plan::dequantize_logfmt(plan::quantize_logfmt(value, scale), scale)
                 : plan::dequantize_fp8(plan::quantize_fp8(value, fp8.inverse), fp8.scale);
    });
  }
  return values;
}

void expect_as_planned(WireFormat format, const std::vector<Row>& rows) {
  const auto hidden = static_cast<std::int64_t>(rows[0].size());
  const auto bytes = static_cast<std::size_t>(plan::wire_row_bytes(format, hidden));
  std::vector<std::vector<std::byte>> wires;
  std::vector<const std::byte*> addresses;
  std::vector<float> want(rows[0].size(), 0.0f);
  for (const Row& row : rows) {
    wires.emplace_back(bytes, std::byte{0x5a});
    encode_row(format, reinterpret_cast<const std::byte*>(row.data()), hidden, wires.back().data());
    const std::vector<float> values = through(format, row);
    for (std::size_t i = 0; i < want.size(); ++i) want[i] = plan::add(want[i], values[i]);
  }
  for (const auto& wire : wires) addresses.push_back(wire.data());
  Row got(rows[0].size(), 0x5a5a);
  sum_wire_rows({format, hidden, addresses.data(), static_cast<int>(addresses.size()),
                 reinterpret_cast<std::byte*>(got.data())});
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_EQ(got[i], plan::from_float<plan::Bfloat16>(want[i]).bits)
        << "value " << i << ", bits " << rows[0][i];
}

class WireRows : public testing::TestWithParam<WireFormat> {};

TEST_P(WireRows, EveryBfloat16ComesHomeAsPlanned) {
  // Ordered, so that a group has values of one size; then mixed.
  Row all(1 << 16);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  expect_as_planned(GetParam(), {all});
  std::mt19937_64 random(3);
  for (std::size_t i = all.size() - 1; i > 0; --i) std::swap(all[i], all[random() % (i + 1)]);
  expect_as_planned(GetParam(), {all});
}

TEST_P(WireRows, RowsOfAllLengthsAreSummedInOrder) {
  std::mt19937_64 random(4);
  for (std::size_t groups = 1; groups <= 9; ++groups) {
    std::vector<Row> rows(groups);
    for (Row& row : rows)
      for (std::size_t i = 0; i < groups * plan::kWireGroup; ++i)
        row.push_back(static_cast<std::uint16_t>((random() & 0x80ff) | (110 + random() % 24) << 7));
    expect_as_planned(GetParam(), rows);
  }
  expect_as_planned(GetParam(), {Row(256, 0), Row(256, 0x8000)});
}

TEST(WireRow, OfNoneIsZero) {
  Row got(plan::kWireGroup, 0x5a5a);
  sum_wire_rows({WireFormat::kLogFmt, plan::kWireGroup, nullptr, 0,
                 reinterpret_cast<std::byte*>(got.data())});
  EXPECT_EQ(got, Row(plan::kWireGroup, 0));
}

INSTANTIATE_TEST_SUITE_P(Formats, WireRows, testing::Values(WireFormat::kLogFmt, WireFormat::kFp8));

}  // namespace
}  // namespace deep_ep::host
