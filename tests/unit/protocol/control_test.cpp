#include "protocol/control.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace deep_ep::protocol {
namespace {

struct Part {
  const char* name;
  const void* begin;
  std::int64_t bytes;
};

std::vector<Part> parts_of(const ControlBlock& block, const ControlShape& shape) {
  const std::int64_t ranks = shape.num_ranks;
  const std::int64_t rings = ranks * shape.num_lanes;
  const std::int64_t flag = sizeof(EpochFlag);
  std::vector<Part> parts = {{"doorbell", block.doorbell, sizeof(Doorbell)},
                             {"fault", block.fault, sizeof(FaultRecord)}};
  for (const Mailbox& mailbox : block.mailbox) {
    parts.push_back({"posted", mailbox.posted, ranks * flag});
    parts.push_back({"record", mailbox.record, ranks * std::int64_t{sizeof(CallRecord)}});
    parts.push_back({"outputs", mailbox.outputs, ranks * std::int64_t{sizeof(OutputsPlace)}});
    parts.push_back({"tokens_per_rank", mailbox.tokens_per_rank, ranks * ranks * 4});
    parts.push_back({"tokens_per_expert", mailbox.tokens_per_expert,
                     ranks * ControlBlock::kMaxLocalExperts * 4});
  }
  parts.push_back({"inbox", block.inbox, ranks * std::int64_t{sizeof(InboxPlace)}});
  parts.push_back({"landed", block.landed, ranks * flag});
  parts.push_back({"pulled", block.pulled, ranks * flag});
  parts.push_back({"ring_tail", block.ring_tail, rings * flag});
  parts.push_back({"ring_head", block.ring_head, rings * flag});
  parts.push_back({"ring_data", block.ring_data, rings * shape.ring_bytes});
  return parts;
}

// The carve of a real base stays within the bytes of the null base, aligned, without overlap.
void expect_disjoint_parts(const ControlShape& shape, std::byte* base) {
  Carver carver(base);
  const ControlBlock block = ControlBlock::carve(carver, shape);
  EXPECT_EQ(carver.used(), ControlBlock::bytes(shape));
  std::int64_t end_before = 0;
  for (const Part& part : parts_of(block, shape)) {
    const std::int64_t begin =
        reinterpret_cast<std::intptr_t>(part.begin) - reinterpret_cast<std::intptr_t>(base);
    EXPECT_GE(begin, end_before) << part.name;
    EXPECT_EQ(begin % Carver::kAlignment, 0) << part.name;
    end_before = begin + part.bytes;
  }
  EXPECT_LE(end_before, carver.used());
}

TEST(Control, RealBaseNeedsWhatNullBaseMeasured) {
  for (const int num_ranks : {1, 2, 3, 8}) {
    for (const int num_lanes : {1, 3}) {
      const ControlShape shape{num_ranks, num_lanes, 1000};
      const std::size_t bytes = ControlBlock::bytes(shape);
      const auto free_aligned = [](std::byte* p) { ::operator delete (p, std::align_val_t{128}); };
      const std::unique_ptr<std::byte, decltype(free_aligned)> memory(
          static_cast<std::byte*>(::operator new (bytes, std::align_val_t{128})), free_aligned);
      expect_disjoint_parts(shape, memory.get());
    }
  }
}

TEST(Control, SizesBeyond32BitsAreExact) {
  // 1024 * 16 rings of 1 MiB: 16 GiB. Only addresses are computed.
  const ControlShape shape{1024, 16, std::int64_t{1} << 20};
  EXPECT_GT(ControlBlock::bytes(shape), std::int64_t{1} << 34);
  expect_disjoint_parts(shape, reinterpret_cast<std::byte*>(std::uintptr_t{1} << 40));
  // The counts of each rank pair alone pass 2^31 entries.
  const ControlShape many_ranks{65536, 1, 128};
  EXPECT_GT(ControlBlock::bytes(many_ranks), 2 * (std::int64_t{1} << 34));
  expect_disjoint_parts(many_ranks, reinterpret_cast<std::byte*>(std::uintptr_t{1} << 40));
}

}  // namespace
}  // namespace deep_ep::protocol
