#include "plan/low_latency.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace deep_ep::plan {
namespace {

/// What a place takes, as [begin, end) in bytes.
struct Extent {
  std::string name;
  const std::byte* begin;
  std::int64_t bytes;
};

template <class T>
void add(std::vector<Extent>& extents, std::string name, const T* begin, std::int64_t count) {
  if (count > 0)
    extents.push_back({std::move(name), reinterpret_cast<const std::byte*>(begin),
                       count * static_cast<std::int64_t>(sizeof(T))});
}

void add_area(std::vector<Extent>& extents, const std::string& name, const MessageArea& area,
              std::int64_t ranks) {
  const std::int64_t messages = ranks * area.max_tokens;
  add(extents, name + " heads", area.heads, messages * area.head_packets);
  add(extents, name + " rows", area.rows,
      ranks * area.max_packeted * area.row_groups * MessageArea::kGroupPackets);
  add(extents, name + " plain", area.plain, messages * area.plain_bytes);
}

std::vector<Extent> extents_of(const LowLatencyLayout& layout, LowLatencyKind kind,
                               std::uint64_t ticket, const LowLatencyShape& shape) {
  const LowLatencyPlaces places = layout.places(kind, ticket, shape);
  const std::string name = kind == LowLatencyKind::kDispatch ? "dispatch" : "combine";
  std::vector<Extent> extents;
  add(extents, name + " calls", places.calls, std::int64_t{shape.num_ranks} * kCallPackets);
  add(extents, name + " counts", places.counts,
      std::int64_t{shape.num_ranks} * places.count_packets);
  add_area(extents, name + " messages", places.messages, shape.num_ranks);
  add_area(extents, name + " returns", places.returns, shape.num_ranks);
  return extents;
}

void expect_apart(std::vector<Extent> extents, const std::byte* base, std::int64_t bytes) {
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const std::byte* end = base;
  std::string before = "the beginning";
  for (const Extent& extent : extents) {
    EXPECT_GE(extent.begin, end) << extent.name << " overlaps " << before;
    end = std::max(end, extent.begin + extent.bytes);
    before = extent.name;
  }
  EXPECT_LE(end, base + bytes) << before << " reaches beyond the memory";
}

LowLatencyShape shape_of(int ranks, std::int64_t max_tokens, std::int64_t row_bytes, int topk,
                         int experts) {
  return {ranks, experts, topk, max_tokens, row_bytes};
}

/// No memory is touched.
std::byte* fake_base() { return reinterpret_cast<std::byte*>(std::uintptr_t{1} << 32); }

LowLatencyShape random_shape(std::mt19937_64& random, int ranks) {
  const auto pick = [&random](std::int64_t least, std::int64_t most) {
    return std::uniform_int_distribution<std::int64_t>(least, most)(random);
  };
  const std::int64_t most_tokens = pick(0, 1) == 0 ? 4 : 512;
  return shape_of(ranks, pick(1, most_tokens), 4 * pick(4, 8192), static_cast<int>(pick(1, 40)),
                  ranks * static_cast<int>(pick(1, 300)));
}

TEST(LowLatencyLayout, PlacesOfAllKindsAndParitiesAreApart) {
  std::mt19937_64 random(5);
  for (int round = 0; round < 200; ++round) {
    SCOPED_TRACE(round);
    const int ranks = 1 + round % 9;
    const LowLatencyShape dispatch = random_shape(random, ranks);
    const LowLatencyShape combine = random_shape(random, ranks);
    const std::int64_t bytes = LowLatencyLayout::bytes(dispatch, combine);
    const LowLatencyLayout layout = LowLatencyLayout::carve(fake_base(), bytes, ranks);
    std::vector<Extent> all;
    add(all, "consumed", layout.consumed, std::int64_t{LowLatencyLayout::kParts} * ranks);
    add(all, "arrived", layout.arrived, std::int64_t{LowLatencyLayout::kParts} * ranks);
    for (const std::uint64_t ticket : {7, 8}) {
      for (const Extent& one : extents_of(layout, LowLatencyKind::kDispatch, ticket, dispatch))
        all.push_back(one);
      for (const Extent& one : extents_of(layout, LowLatencyKind::kCombine, ticket, combine))
        all.push_back(one);
    }
    expect_apart(all, fake_base(), bytes);
  }
}

TEST(LowLatencyLayout, PartsDependOnNoShape) {
  // A short call may follow a long one while that one is still read: both lie within the same
  // parts.
  std::mt19937_64 random(6);
  const int ranks = 4;
  const LowLatencyShape large = shape_of(ranks, 300, 16384, 32, 256);
  const std::int64_t bytes = LowLatencyLayout::bytes(large, large);
  const LowLatencyLayout layout = LowLatencyLayout::carve(fake_base(), bytes, ranks);
  int tried = 0;
  for (int round = 0; round < 200; ++round) {
    const LowLatencyShape shape = random_shape(random, ranks);
    for (const LowLatencyKind kind : {LowLatencyKind::kDispatch, LowLatencyKind::kCombine}) {
      if (!LowLatencyLayout::fits(shape, kind, bytes)) continue;
      ++tried;
      for (const std::uint64_t ticket : {1, 2}) {
        const int part = LowLatencyLayout::part(kind, ticket);
        const std::byte* packets = layout.packets + part * layout.packet_part_bytes;
        const std::byte* plain = layout.plain + part * layout.plain_part_bytes;
        for (const Extent& one : extents_of(layout, kind, ticket, shape)) {
          const bool in_packets =
              one.begin >= packets && one.begin + one.bytes <= packets + layout.packet_part_bytes;
          const bool in_plain =
              one.begin >= plain && one.begin + one.bytes <= plain + layout.plain_part_bytes;
          EXPECT_TRUE(in_packets || in_plain) << one.name << " leaves part " << part;
          EXPECT_EQ(in_plain, one.name.ends_with("plain")) << one.name;
        }
      }
    }
  }
  EXPECT_GT(tried, 100);
}

TEST(LowLatencyLayout, BytesAreTheFewestThatFitWithAllRowsInPackets) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(round);
    const int ranks = 1 + round % 8;
    const LowLatencyShape dispatch = random_shape(random, ranks);
    const LowLatencyShape combine = random_shape(random, ranks);
    const std::int64_t bytes = LowLatencyLayout::bytes(dispatch, combine);
    EXPECT_TRUE(LowLatencyLayout::fits(dispatch, LowLatencyKind::kDispatch, bytes));
    EXPECT_TRUE(LowLatencyLayout::fits(combine, LowLatencyKind::kCombine, bytes));
    const auto all_packeted = [&](std::int64_t size) {
      const LowLatencyLayout layout = LowLatencyLayout::carve(fake_base(), size, ranks);
      const auto messages = layout.places(LowLatencyKind::kDispatch, 1, dispatch).messages;
      const auto returns = layout.places(LowLatencyKind::kCombine, 1, combine).returns;
      return messages.max_packeted == dispatch.max_tokens &&
             returns.max_packeted == combine.max_tokens &&
             LowLatencyLayout::fits(dispatch, LowLatencyKind::kDispatch, size) &&
             LowLatencyLayout::fits(combine, LowLatencyKind::kCombine, size);
    };
    const LowLatencyLayout layout = LowLatencyLayout::carve(nullptr, bytes, ranks);
    if (layout.packet_part_bytes * LowLatencyLayout::kParts >= LowLatencyLayout::kMaxPacketBytes)
      continue;
    EXPECT_TRUE(all_packeted(bytes));
    EXPECT_FALSE(all_packeted(bytes - 4 * Carver::kAlignment * LowLatencyLayout::kParts));
  }
}

TEST(LowLatencyLayout, WhatFitsFitsIntoMore) {
  const LowLatencyShape shape = shape_of(4, 128, 14336, 8, 256);
  bool fitted = false;
  for (std::int64_t bytes = 0; bytes < 400'000'000; bytes += 999'999) {
    const bool fits = LowLatencyLayout::fits(shape, LowLatencyKind::kDispatch, bytes) &&
                      LowLatencyLayout::fits(shape, LowLatencyKind::kCombine, bytes);
    EXPECT_TRUE(fits || !fitted) << bytes;
    fitted = fits;
  }
  EXPECT_TRUE(fitted);
}

TEST(LowLatencyLayout, DecodeBatchesOfADeepSeekLayerNeedAtMost100MB) {
  const LowLatencyShape shape = shape_of(4, 128, 14336, 32, 256);
  EXPECT_LE(LowLatencyLayout::bytes(shape, shape), 100'000'000);
}

TEST(PacketTag, IsNeverZeroAndAlikeForNoNeighbours) {
  constexpr std::uint64_t kPeriod = 0xffffffff;
  std::vector<std::uint64_t> tickets;
  for (const std::uint64_t around :
       {std::uint64_t{3}, kPeriod / 2, kPeriod, 2 * kPeriod, std::uint64_t{1} << 63}) {
    for (std::uint64_t i = 0; i < 8; ++i) tickets.push_back(around - 3 + i);
  }
  for (const std::uint64_t ticket : tickets) {
    const std::uint32_t dispatch = packet_tag(LowLatencyKind::kDispatch, ticket);
    const std::uint32_t combine = packet_tag(LowLatencyKind::kCombine, ticket);
    EXPECT_NE(dispatch, 0u) << ticket;
    EXPECT_NE(combine, 0u) << ticket;
    EXPECT_NE(dispatch, combine) << ticket;
    for (std::uint64_t later = 1; later <= 8; ++later) {
      EXPECT_NE(packet_tag(LowLatencyKind::kDispatch, ticket + later), dispatch) << ticket;
      EXPECT_NE(packet_tag(LowLatencyKind::kCombine, ticket + later), dispatch) << ticket;
    }
    const std::uint64_t most = (std::uint64_t{1} << 31) - 1;
    EXPECT_NE(packet_tag(LowLatencyKind::kDispatch, ticket + most - 1), dispatch) << ticket;
  }
}

}  // namespace
}  // namespace deep_ep::plan
