#include "protocol/ring.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <thread>
#include <vector>

namespace deep_ep::protocol {
namespace {

struct Ring {
  explicit Ring(std::int64_t bytes, std::uint64_t start = 0) : data(bytes) {
    const RingShape shape{bytes};
    tail.value = head.value = start;
    sender = {shape, data.data(), &tail, &head, start, start};
    receiver = {shape, data.data(), &tail, &head, start, start};
  }
  Ring(const Ring&) = delete;

  EpochFlag tail{}, head{};
  std::vector<std::byte> data;
  RingSender sender{};
  RingReceiver receiver{};
};

TEST(Ring, RecordsAreContiguousAndTheGapBeforeTheEndIsSkipped) {
  const RingShape shape{100};
  EXPECT_EQ(shape.record_begin(0, 25), 0u);
  EXPECT_EQ(shape.record_begin(75, 25), 75u);   // ends exactly at the end
  EXPECT_EQ(shape.record_begin(76, 25), 100u);  // would cross it
  EXPECT_EQ(shape.record_begin(176, 25), 200u);
  EXPECT_EQ(shape.record_begin(100, 25), 100u);
}

TEST(Ring, SenderStopsWhenCreditsRunOut) {
  Ring ring(16);
  for (int i = 0; i < 4; ++i) {
    ASSERT_NE(ring.sender.reserve(4), nullptr);
    ring.sender.advance(4);
  }
  EXPECT_EQ(ring.sender.reserve(4), nullptr);
  ring.sender.publish();
  ASSERT_NE(ring.receiver.peek(4), nullptr);
  ring.receiver.advance(4);
  EXPECT_EQ(ring.sender.reserve(4), nullptr) << "read, but the credits are not returned yet";
  ring.receiver.release();
  EXPECT_EQ(ring.sender.reserve(4), ring.data.data());
}

TEST(Ring, NothingArrivesBeforePublish) {
  Ring ring(16);
  ring.sender.advance(4);
  EXPECT_EQ(ring.receiver.peek(4), nullptr);
  ring.sender.publish();
  EXPECT_EQ(ring.receiver.peek(4), ring.data.data());
}

// Every reachable state of a ring of 16 bytes and `sizes.size()` records, whatever the order of
// write, publish, read and release, against a queue: record i consists of bytes i + 1.
class EveryOrder {
 public:
  explicit EveryOrder(std::vector<int> sizes, std::uint64_t start)
      : sizes_(std::move(sizes)), start_(start) {}

  std::size_t explore() {
    visit({});
    return seen_.size();
  }

 private:
  struct State {
    std::size_t written = 0, published = 0, read = 0, released = 0;
    std::uint64_t freed = 0, arrived = 0;
    std::array<std::uint64_t, 6> key() const {
      return {written, published, read, released, freed, arrived};
    }
  };

  // The ring as the steps that led to `state` left it.
  void restore(Ring& ring, const State& state) const {
    std::vector<std::uint64_t> ends = {start_};
    for (std::size_t i = 0; i < state.written; ++i) {
      const std::uint64_t begin = ring.sender.shape.record_begin(ends.back(), sizes_[i]);
      std::memset(ring.data.data() + begin % ring.data.size(), static_cast<int>(i) + 1, sizes_[i]);
      ends.push_back(begin + sizes_[i]);
    }
    ring.tail.value = ends[state.published];
    ring.head.value = ends[state.released];
    ring.sender.written = ends[state.written];
    ring.receiver.consumed = ends[state.read];
    ring.sender.freed = start_ + state.freed;
    ring.receiver.arrived = start_ + state.arrived;
  }

  void visit(State state) {
    if (!seen_.insert(state.key()).second) return;
    const bool wrote = try_write(state);
    const bool read = try_read(state);
    if (state.published < state.written) step(state, [](State& s) { s.published = s.written; });
    if (state.released < state.read) step(state, [](State& s) { s.released = s.read; });
    const bool all_told = state.published == state.written && state.released == state.read;
    EXPECT_TRUE(!all_told || wrote || read || state.read == sizes_.size()) << "stuck";
  }

  template <class Change>
  void step(State state, Change change) {
    change(state);
    visit(state);
  }

  bool try_write(const State& state) {
    if (state.written == sizes_.size()) return false;
    Ring ring(16, start_);
    restore(ring, state);
    std::byte* place = ring.sender.reserve(sizes_[state.written]);
    step(state, [&](State& s) {
      s.freed = ring.sender.freed - start_;
      s.written += place != nullptr;
    });
    if (place == nullptr) return false;
    EXPECT_GE(place, ring.data.data());
    EXPECT_LE(place + sizes_[state.written], ring.data.data() + 16);
    // What the receiver has not released must survive the write.
    std::memset(place, 99, sizes_[state.written]);
    ring.receiver.arrived = ring.tail.value = ring.sender.written;
    ring.receiver.consumed = ring.head.value;
    for (std::size_t i = state.released; i < state.written; ++i) expect_record(ring, i);
    return true;
  }

  bool try_read(const State& state) {
    if (state.read == sizes_.size()) return false;
    Ring ring(16, start_);
    restore(ring, state);
    const bool here = ring.receiver.peek(sizes_[state.read]) != nullptr;
    EXPECT_EQ(here, state.read < state.published);
    if (here) expect_record(ring, state.read);
    step(state, [&](State& s) {
      s.arrived = ring.receiver.arrived - start_;
      s.read += here;
    });
    return here;
  }

  void expect_record(Ring& ring, std::size_t i) const {
    const std::byte* record = ring.receiver.peek(sizes_[i]);
    ASSERT_NE(record, nullptr);
    for (int byte = 0; byte < sizes_[i]; ++byte)
      ASSERT_EQ(static_cast<std::size_t>(record[byte]), i + 1);
    ring.receiver.advance(sizes_[i]);
  }

  std::vector<int> sizes_;
  std::uint64_t start_;
  std::set<std::array<std::uint64_t, 6>> seen_;
};

TEST(Ring, BehavesAsAQueueInEveryOrderOfSteps) {
  constexpr int kRecords = 6;
  std::size_t states = 0;
  for (int code = 0; code < 3 * 3 * 3 * 3 * 3 * 3; ++code) {
    std::vector<int> sizes;
    for (int i = 0, rest = code; i < kRecords; ++i, rest /= 3) sizes.push_back(2 + rest % 3);
    // Starts at the beginning, in the middle of a later lap, and near its end.
    for (const std::uint64_t start :
         {std::uint64_t{0}, (std::uint64_t{1} << 40) + 7, (std::uint64_t{1} << 40) + 14}) {
      states += EveryOrder(sizes, start).explore();
      ASSERT_FALSE(HasFailure()) << "sizes code " << code << ", start " << start;
    }
  }
  EXPECT_GT(states, 100'000u);
}

// Calls follow each other without a reset: both sides derive the sizes from the call alone.
TEST(Ring, CallsWithDifferentRecordSizesFollowEachOtherBetweenThreads) {
  constexpr std::uint64_t kSeed = 20;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  constexpr int kCalls = 300;
  const auto size_of_call = [](int call) { return 1 + (call * 37) % 250; };
  const auto rows_of_call = [](int call) { return (call * 13) % 60; };
  Ring ring(1000);
  std::thread sender([&] {
    std::minstd_rand random(kSeed);
    std::uint8_t next = 1;
    for (int call = 0; call < kCalls; ++call) {
      for (int row = 0; row < rows_of_call(call); ++row) {
        std::byte* place = ring.sender.reserve(size_of_call(call));
        while (place == nullptr) {
          ring.sender.publish();
          std::this_thread::yield();
          place = ring.sender.reserve(size_of_call(call));
        }
        std::memset(place, next++, size_of_call(call));
        ring.sender.advance(size_of_call(call));
        if (random() % 3 == 0) ring.sender.publish();
      }
      ring.sender.publish();
    }
  });
  std::int64_t wrong = 0;
  std::uint8_t next = 1;
  for (int call = 0; call < kCalls; ++call) {
    for (int row = 0; row < rows_of_call(call); ++row, ++next) {
      const std::byte* record = ring.receiver.peek(size_of_call(call));
      while (record == nullptr) {
        ring.receiver.release();
        std::this_thread::yield();
        record = ring.receiver.peek(size_of_call(call));
      }
      for (int i = 0; i < size_of_call(call); ++i) wrong += record[i] != std::byte{next};
      ring.receiver.advance(size_of_call(call));
    }
    ring.receiver.release();
  }
  sender.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(ring.sender.written, ring.receiver.consumed);
}

}  // namespace
}  // namespace deep_ep::protocol
