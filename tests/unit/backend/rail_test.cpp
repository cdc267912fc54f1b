#include "backend/host/internode/rail.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

namespace deep_ep::host::internode {
namespace {

/// A heap of one rank, both ends of a ring in it; what was put arrives with the signal behind it.
class LateHeap final : public fabric::SymmetricHeap {
 public:
  explicit LateHeap(std::int64_t bytes) : memory_(bytes / 8, 0) {}
  std::byte* base() const noexcept override {
    return reinterpret_cast<std::byte*>(const_cast<std::uint64_t*>(memory_.data()));
  }
  std::int64_t bytes() const noexcept override {
    return static_cast<std::int64_t>(memory_.size()) * 8;
  }
  void put(int, std::int64_t offset, const void* source, std::int64_t bytes) override {
    puts.push_back({offset, static_cast<const std::byte*>(source), bytes});
    all.puts += 1;
    all.put_bytes += bytes;
  }
  void signal(int, std::int64_t offset, std::uint64_t value) override {
    for (const Put& one : puts) std::memcpy(base() + one.offset, one.source, one.bytes);
    if (!puts.empty()) unflushed = true;
    puts.clear();
    std::memcpy(base() + offset, &value, sizeof value);
    ++all.signals;
  }
  bool flush(int, std::chrono::milliseconds) override {
    if (!flushes) return false;
    unflushed = false;
    return true;
  }
  bool lost(int) const noexcept override { return false; }
  fabric::TransportCounts counts() const noexcept override { return all; }

  struct Put {
    std::int64_t offset;
    const std::byte* source;
    std::int64_t bytes;
  };
  std::vector<Put> puts;
  bool flushes = true;
  bool unflushed = false;
  fabric::TransportCounts all;

 private:
  std::vector<std::uint64_t> memory_;
};

constexpr std::int64_t kRing = 1024;
constexpr std::int64_t kData = 512;

struct Rail {
  Rail()
      : heap(kData + kRing),
        mirror(kRing),
        sender(heap, place(), mirror.data()),
        receiver(heap, place()) {}
  static RailPlace place() { return {0, {kRing}, kData, 0, 128}; }

  bool write(std::int64_t bytes, std::uint8_t value) {
    return sender.write_row(bytes, [&](std::int64_t begin, std::int64_t count, std::byte* to) {
      for (std::int64_t i = 0; i < count; ++i)
        to[i] = static_cast<std::byte>(value + (begin + i) % 7);
    });
  }
  static void check(const std::byte* row, std::int64_t bytes, std::uint8_t value) {
    for (std::int64_t i = 0; i < bytes; ++i)
      ASSERT_EQ(row[i], static_cast<std::byte>(value + i % 7)) << i;
  }

  LateHeap heap;
  std::vector<std::byte> mirror;
  RailSender sender;
  RailReceiver receiver;
};

TEST(Rail, NothingArrivesBeforePublish) {
  Rail rail;
  ASSERT_TRUE(rail.write(128, 3));
  EXPECT_EQ(rail.receiver.row(128), nullptr);
  rail.sender.publish();
  ASSERT_NE(rail.receiver.row(128), nullptr);
  Rail::check(rail.receiver.row(128), 128, 3);
}

TEST(Rail, RowsOfAnySizeGetThroughInOrderAndNoPutCrossesTheEnd) {
  std::mt19937_64 random(5);
  Rail rail;
  std::vector<std::pair<std::int64_t, std::uint8_t>> under_way;
  std::int64_t bytes_written = 0;
  for (int round = 0; round < 3000;) {
    const std::int64_t bytes = 64 * (1 + static_cast<std::int64_t>(random() % 9));
    const auto value = static_cast<std::uint8_t>(round);
    // A row that is longer than a piece needs the other side's turn.
    while (!rail.write(bytes, value)) {
      rail.sender.publish();
      if (!under_way.empty()) {
        const auto [length, wanted] = under_way.front();
        const std::byte* row = rail.receiver.row(length);
        if (row != nullptr) {
          Rail::check(row, length, wanted);
          rail.receiver.pop(length);
          under_way.erase(under_way.begin());
        }
      } else {
        ASSERT_EQ(rail.receiver.row(bytes), nullptr) << "a row is not complete before its end";
      }
      rail.receiver.release();
    }
    under_way.emplace_back(bytes, value);
    bytes_written += bytes;
    for (const LateHeap::Put& put : rail.heap.puts)
      EXPECT_LE(put.offset + put.bytes, kData + kRing);
    if (random() % 3 == 0) rail.sender.publish();
    ++round;
  }
  rail.sender.publish();
  for (const auto& [length, wanted] : under_way) {
    const std::byte* row = rail.receiver.row(length);
    ASSERT_NE(row, nullptr);
    Rail::check(row, length, wanted);
    rail.receiver.pop(length);
  }
  EXPECT_FALSE(rail.sender.idle()) << "the credits are not returned yet";
  rail.receiver.release();
  EXPECT_TRUE(rail.sender.idle());
  EXPECT_EQ(rail.heap.all.put_bytes, bytes_written) << "every byte once, and no gap";
}

TEST(Rail, TheMirrorIsNotWrittenBeforeWhatLiesThereWasFlushed) {
  Rail rail;
  rail.heap.flushes = false;
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(rail.write(256, 1));
    rail.sender.publish();
    ASSERT_NE(rail.receiver.row(256), nullptr);
    rail.receiver.pop(256);
    rail.receiver.release();
  }
  EXPECT_FALSE(rail.write(256, 2)) << "consumed, but its source may not be changed";
  EXPECT_FALSE(rail.sender.idle());
  rail.heap.flushes = true;
  EXPECT_TRUE(rail.write(256, 2));
}

}  // namespace
}  // namespace deep_ep::host::internode
