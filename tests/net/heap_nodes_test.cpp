#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <vector>

#include "base/error.hpp"
#include "heap_exchange.hpp"
#include "namespaces.hpp"

namespace deep_ep::fabric {
namespace {

using Clock = std::chrono::steady_clock;
using net::Namespaces;

TEST(SymmetricHeapNodes, BytesCrossTheNetworkBetweenTwoNodesOfTwoRanks) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(2);
  in_ranks(4, [&](Bootstrap& bootstrap) {
    net::live_on(nodes, bootstrap.rank() / 2);
    exchange(bootstrap);
  });
}

TEST(SymmetricHeapNodes, DevicesCountAtLeastThePayload) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(2);
  constexpr std::int64_t kBytes = 8 << 20;
  const auto before = nodes.traffic(0);
  in_ranks(2, [&](Bootstrap& bootstrap) {
    net::live_on(nodes, bootstrap.rank());
    const std::vector<char> source(kBytes, 'x');
    const auto heap = make_heap(bootstrap, kBytes + 8);
    if (bootstrap.rank() == 0) {
      heap->put(1, 0, source.data(), kBytes);
      heap->signal(1, kBytes, 1);
      EXPECT_TRUE(heap->flush(1, milliseconds(20000)));
    } else {
      EXPECT_EQ(await_word(*heap, kBytes, 1), 1u);
      EXPECT_EQ(std::memcmp(heap->base(), source.data(), kBytes), 0);
    }
    bootstrap.barrier();
  });
  const auto after = nodes.traffic(0);
  EXPECT_GE(after.sent - before.sent, kBytes);
  EXPECT_LT(after.sent - before.sent, kBytes + kBytes / 10);
  EXPECT_LT(after.received - before.received, kBytes / 10);
}

/// Keep-alives as impatient as TCP has them.
void miss_silent_peers_soon() {
  setenv("UCX_TCP_KEEPIDLE", "1s", 1);
  setenv("UCX_TCP_KEEPINTVL", "1s", 1);
  setenv("UCX_TCP_KEEPCNT", "2", 1);
}

// Only the side that made the connection has keep-alives, in UCX 1.13; and Linux does not count
// those that its own device refuses, so who pulls his own cable does not find out.
void expect_noticed(const std::function<void(const Namespaces&)>& part) {
  const Namespaces nodes(2);
  in_ranks(2, [&](Bootstrap& bootstrap) {
    net::live_on(nodes, bootstrap.rank());
    miss_silent_peers_soon();
    auto heap = make_heap(bootstrap, 4096);
    // TCP counts keep-alives while nothing else is under way, such as UCX's own first messages.
    std::this_thread::sleep_for(milliseconds(300));
    bootstrap.barrier();
    if (bootstrap.rank() == 0) part(nodes);
    const int other = 1 - bootstrap.rank();
    const bool noticed = await_loss(*heap, other, milliseconds(7000));
    if (noticed) {
      EXPECT_THROW(heap->signal(other, 0, 1), Error);
    }
    EXPECT_THAT(bootstrap.all_gather(noticed ? "noticed" : ""), ::testing::Contains("noticed"));
    const auto begin = Clock::now();
    heap.reset();
    EXPECT_LT(Clock::now() - begin, kEnd);
  });
}

TEST(SymmetricHeapNodes, ANetworkThatPartsQuietPeersIsNoticed) {
  NEEDS_NAMESPACES();
  expect_noticed([](const Namespaces& nodes) { nodes.set_silent(1, true); });
}

TEST(SymmetricHeapNodes, APulledCableOfAQuietPeerIsNoticed) {
  NEEDS_NAMESPACES();
  expect_noticed([](const Namespaces& nodes) { nodes.set_link(1, false); });
}

TEST(SymmetricHeapNodes, FlushAndDestructionEndThoughTheCableIsPulled) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(2);
  in_ranks(2, [&](Bootstrap& bootstrap) {
    net::live_on(nodes, bootstrap.rank());
    constexpr std::int64_t kBytes = 32 << 20;  // more than sockets hold
    const std::vector<char> source(kBytes, 'x');
    auto heap = make_heap(bootstrap, kBytes);
    bootstrap.barrier();
    if (bootstrap.rank() == 0) nodes.set_link(1, false);
    bootstrap.barrier();
    const int other = 1 - bootstrap.rank();
    const auto begin = Clock::now();
    heap->put(other, 0, source.data(), kBytes);
    EXPECT_FALSE(heap->flush(other, milliseconds(500)));
    heap.reset();
    EXPECT_LT(Clock::now() - begin, kEnd);
  });
}

// Both send, so that who closes has not read all, which makes TCP drop what is still under way.
TEST(SymmetricHeapNodes, WhoAbandonsItsHeapStaysUntilOthersHaveWhatItToldThem) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(2);
  in_ranks(2, [&](Bootstrap& bootstrap) {
    net::live_on(nodes, bootstrap.rank());
    constexpr std::int64_t kBytes = 300'000;  // 0.12 s
    const std::vector<char> source(kBytes, 'x');
    auto heap = make_heap(bootstrap, kBytes + 8);
    bootstrap.barrier();
    if (bootstrap.rank() == 0) nodes.shape(1, "20mbit", "burst 20kb latency 50ms");
    bootstrap.barrier();
    const int other = 1 - bootstrap.rank();
    heap->put(other, 0, source.data(), kBytes);
    heap->signal(other, kBytes, 1);
    if (bootstrap.rank() == 0) {
      const auto begin = Clock::now();
      heap->abandon();
      heap.reset();
      EXPECT_LT(Clock::now() - begin, kEnd);
    } else {
      EXPECT_EQ(await_word(*heap, kBytes, 1, kEnd), 1u);
      EXPECT_EQ(std::memcmp(heap->base(), source.data(), kBytes), 0);
    }
    bootstrap.barrier();
  });
}

TEST(SymmetricHeapNodes, RanksThatCannotReachEachOtherAllFailInTime) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(2);
  nodes.set_silent(1, true);
  in_ranks(2, [&](Bootstrap& bootstrap) {
    net::live_on(nodes, bootstrap.rank());
    const auto begin = Clock::now();
    try {
      make_symmetric_heap(bootstrap, {.bytes = 4096, .timeout = milliseconds(1000)});
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_THAT(error.code(), ::testing::AnyOf(ErrorCode::kTimeout, ErrorCode::kPeerFailed))
          << error.what();
      EXPECT_THAT(error.ranks(), ::testing::ElementsAre(1 - bootstrap.rank())) << error.what();
    }
    EXPECT_LT(Clock::now() - begin, kEnd);
  });
}

}  // namespace
}  // namespace deep_ep::fabric
