#include "plan/wire.hpp"

#include <gtest/gtest.h>

namespace deep_ep::plan::test {
namespace {

TEST(WireRow, KnownSizes) {
  EXPECT_EQ(wire_row_bytes(WireFormat::kBfloat16, 7168), 14336);
  EXPECT_EQ(wire_row_bytes(WireFormat::kLogFmt, 7168), 56 * 164);
  EXPECT_EQ(wire_row_bytes(WireFormat::kFp8, 7168), 56 * 132);
  EXPECT_EQ(wire_row_bytes(WireFormat::kLogFmt, 128), 176) << "164, in units of 16";
}

TEST(WireRow, PartsFollowEachOther) {
  for (const std::int64_t hidden : {128, 256, 640, 7168, 16384}) {
    const WireRow logfmt = WireRow::of(WireFormat::kLogFmt, hidden);
    EXPECT_EQ(logfmt.high, hidden);
    EXPECT_EQ(logfmt.words, hidden * 10 / 8);
    EXPECT_GE(logfmt.bytes, logfmt.words + hidden / kWireGroup * 4);
    const WireRow fp8 = WireRow::of(WireFormat::kFp8, hidden);
    EXPECT_EQ(fp8.words, hidden);
    EXPECT_GE(fp8.bytes, fp8.words + hidden / kWireGroup * 4);
    for (const WireRow& row : {logfmt, fp8}) {
      EXPECT_EQ(row.bytes % 16, 0);
      EXPECT_EQ(row.words % 4, 0);
      EXPECT_LT(row.bytes, 2 * hidden) << "never more than bfloat16, for which memory is measured";
    }
  }
}

}  // namespace
}  // namespace deep_ep::plan::test
