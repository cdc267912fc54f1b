#include "protocol/rail.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

namespace deep_ep::protocol {
namespace {

std::byte* bytes_of(void* part) { return static_cast<std::byte*>(part); }

TEST(RailBlock, MeasuringAndPlacingAgreeAndPartsDoNotOverlap) {
  for (const RailShape& shape :
       {RailShape{2, 1, 1, 1 << 16}, RailShape{8, 2, 3, 12800}, RailShape{6, 3, 2, 1 << 12}}) {
    const std::int64_t bytes = RailBlock::bytes(shape);
    std::byte* memory = static_cast<std::byte*>(std::aligned_alloc(128, bytes));
    Carver carver(memory);
    const RailBlock block = RailBlock::carve(carver, shape);
    EXPECT_EQ(carver.used(), bytes);
    const std::int64_t peers = shape.num_peers();
    const std::int64_t rings = peers * shape.num_lanes;
    std::vector<std::pair<std::byte*, std::int64_t>> parts{
        {bytes_of(block.faulted), shape.num_ranks * std::int64_t{sizeof(EpochFlag)}},
        {bytes_of(block.faults), shape.num_ranks * std::int64_t{sizeof(FaultRecord)}},
        {bytes_of(block.out_fault), sizeof(FaultRecord)},
        {bytes_of(block.wait_mark), shape.num_ranks * std::int64_t{8}}};
    for (const RailBlock::Mailbox& mailbox : block.mailbox) {
      parts.emplace_back(bytes_of(mailbox.posted), peers * std::int64_t{sizeof(EpochFlag)});
      parts.emplace_back(mailbox.messages, peers * shape.message_bytes());
      parts.emplace_back(mailbox.out_messages, peers * shape.message_bytes());
    }
    parts.emplace_back(bytes_of(block.ring_tail), rings * std::int64_t{sizeof(EpochFlag)});
    parts.emplace_back(bytes_of(block.ring_head), rings * std::int64_t{sizeof(EpochFlag)});
    parts.emplace_back(block.ring_data, rings * shape.ring_bytes);
    parts.emplace_back(block.out_ring_data, rings * shape.ring_bytes);
    const std::byte* free = memory;
    for (const auto& [begin, length] : parts) {
      EXPECT_GE(begin, free);
      EXPECT_EQ((begin - memory) % Carver::kAlignment, 0);
      free = begin + length;
    }
    EXPECT_LE(free, memory + bytes);
    std::free(memory);
  }
}

TEST(RailBlock, AMessageHoldsEveryExpertOfTheLargestNode) {
  const RailShape shape{4, 2};
  EXPECT_GE(shape.message_bytes(), static_cast<std::int64_t>(sizeof(RailMessage)) +
                                       2 * ControlBlock::kMaxLocalExperts * 4);
}

TEST(RailBlock, FittedRingsFillTheMemoryAndStayUsable) {
  const RailShape ranks{8, 2};
  const std::int64_t fixed = RailBlock::bytes({8, 2, 1, 0});
  for (const std::int64_t mib : {2, 7, 64, 1000}) {
    for (const int most_lanes : {1, 2, 16}) {
      const std::int64_t bytes = fixed + (mib << 20);
      const RailShape shape = RailBlock::fit(ranks, most_lanes, bytes);
      EXPECT_GE(shape.num_lanes, 1);
      EXPECT_LE(shape.num_lanes, most_lanes);
      EXPECT_LE(RailBlock::bytes(shape), bytes);
      EXPECT_GE(shape.ring_bytes, RailBlock::kMinRingBytes);
      EXPECT_EQ(shape.ring_bytes % 128, 0);
      // Another lane would have left rings that are too short.
      if (shape.num_lanes < most_lanes) {
        EXPECT_LT((mib << 20) / (2 * 3 * (shape.num_lanes + 1)), RailBlock::kMinRingBytes + 4096);
      }
    }
  }
}

}  // namespace
}  // namespace deep_ep::protocol
