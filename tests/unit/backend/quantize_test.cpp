#include "backend/host/quantize.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "plan/reference_low_latency.hpp"

namespace deep_ep::host {
namespace {

using deep_ep::internode_ll::Quantization;
using plan::reference::LowLatencyScales;

void expect_as_reference(const std::vector<std::uint16_t>& row, Quantization quantization,
                         LowLatencyScales scales) {
  std::vector<std::byte> bytes(row.size() * 2);
  std::memcpy(bytes.data(), row.data(), bytes.size());
  const plan::reference::QuantizedRow want = plan::reference::quantize_row(bytes, scales);
  std::vector<std::byte> codes(want.x.size(), std::byte{0x5a});
  std::vector<std::byte> words(want.scales.size(), std::byte{0x5a});
  quantize_row(bytes.data(), static_cast<std::int64_t>(row.size()), quantization, codes.data(),
               words.data());
  for (std::size_t i = 0; i < codes.size(); ++i)
    ASSERT_EQ(codes[i], want.x[i]) << "value " << i << ", bits " << row[i];
  EXPECT_EQ(words, want.scales);
}

void expect_as_reference(const std::vector<std::uint16_t>& row) {
  expect_as_reference(row, Quantization::kFp8, LowLatencyScales::kFloat32);
  expect_as_reference(row, Quantization::kFp8PowerOfTwo, LowLatencyScales::kPowerOfTwo);
  expect_as_reference(row, Quantization::kFp8Ue8m0, LowLatencyScales::kUe8m0);
}

TEST(QuantizeRow, EveryBfloat16IsCodedAsTheReferenceCodesIt) {
  // Ordered, so that a group has values of one size; then mixed.
  std::vector<std::uint16_t> all(1 << 16);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  expect_as_reference(all);
  std::mt19937_64 random(3);
  for (std::size_t i = all.size() - 1; i > 0; --i) std::swap(all[i], all[random() % (i + 1)]);
  expect_as_reference(all);
}

TEST(QuantizeRow, OrdinaryRowsOfAllLengths) {
  std::mt19937_64 random(4);
  for (std::size_t groups = 1; groups <= 9; ++groups) {
    std::vector<std::uint16_t> row(groups * 128);
    for (std::uint16_t& value : row)
      value = static_cast<std::uint16_t>((random() & 0x80ff) | (110 + random() % 24) << 7);
    expect_as_reference(row);
  }
  expect_as_reference(std::vector<std::uint16_t>(256, 0));
}

}  // namespace
}  // namespace deep_ep::host
