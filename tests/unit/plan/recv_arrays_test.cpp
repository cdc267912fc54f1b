#include "plan/recv_arrays.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace deep_ep::plan {
namespace {

TEST(RecvArrays, MeasuringAndPlacingAgreeAndPartsDoNotOverlap) {
  const RowFormat format{
      .x_bytes = 48, .scale_bytes = 12, .topk_idx_bytes = 8, .topk_weights_bytes = 20};
  for (const std::int64_t rows : {0, 1, 7, 128, 1001}) {
    const std::int64_t bytes = RecvArrays::bytes(format, rows);
    alignas(128) static std::byte block[1 << 20];
    ASSERT_LE(bytes, static_cast<std::int64_t>(sizeof(block)));
    Carver carver(block);
    const RecvArrays arrays = RecvArrays::carve(carver, format, rows);
    EXPECT_EQ(carver.used(), bytes);

    const std::byte* src_idx = reinterpret_cast<const std::byte*>(arrays.src_idx);
    const std::vector<std::pair<const std::byte*, std::int64_t>> parts = {{arrays.x, 48},
                                                                          {arrays.scales, 12},
                                                                          {arrays.topk_idx, 8},
                                                                          {arrays.topk_weights, 20},
                                                                          {src_idx, 4}};
    const std::byte* free = block;
    for (const auto& [begin, row_bytes] : parts) {
      EXPECT_GE(begin, free);
      EXPECT_EQ((begin - block) % Carver::kAlignment, 0);
      free = begin + rows * row_bytes;
    }
    EXPECT_LE(free, block + bytes);
  }
}

TEST(RecvArrays, OffsetsAreWiderThan32Bits) {
  const RowFormat format{.x_bytes = 14336, .topk_idx_bytes = 64, .topk_weights_bytes = 32};
  const std::int64_t rows = (std::int64_t{1} << 31) - 1;
  // x ends on a multiple of 128 bytes, the others are rounded up to one.
  EXPECT_EQ(RecvArrays::bytes(format, rows),
            rows * 14336 + (rows * 64 + 64) + (rows * 32 + 32) + (rows * 4 + 4));
}

TEST(RecvArrays, WithXElsewhereTheBlockHasTheRest) {
  const RowFormat format{.x_bytes = 48, .scale_bytes = 12, .topk_idx_bytes = 8};
  alignas(128) static std::byte block[1 << 12];
  std::byte elsewhere[1];
  Carver carver(block);
  const RecvArrays arrays = RecvArrays::carve(carver, format, 5, elsewhere);
  EXPECT_EQ(arrays.x, elsewhere);
  EXPECT_EQ(arrays.scales, block);
  EXPECT_EQ(carver.used(), RecvArrays::bytes(format.without_x(), 5));
}

}  // namespace
}  // namespace deep_ep::plan
