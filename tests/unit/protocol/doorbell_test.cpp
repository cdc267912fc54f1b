#include "protocol/doorbell.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "protocol/atomic.hpp"
#include "protocol/epoch.hpp"

namespace deep_ep::protocol {
namespace {

// Longer than any sleep below may last if a wake-up is not lost.
constexpr std::int64_t kForeverNs = 60'000'000'000;
constexpr std::uint64_t kRounds = 20'000;

struct Shared {
  Doorbell doorbell[2];
  EpochFlag flag[2];
};

// A rank that knows nothing but sleeping: each of its waits would last kForeverNs if one ring were
// lost. Returns the number of sleeps that lasted that long.
int play(Shared& shared, int me) {
  int lost = 0;
  for (std::uint64_t epoch = 1; epoch <= kRounds; ++epoch) {
    shared.flag[1 - me].publish(epoch);
    shared.doorbell[1 - me].ring();
    const auto arrived = [&] { return shared.flag[me].reached(epoch); };
    while (!arrived()) {
      const auto begin = std::chrono::steady_clock::now();
      if (shared.doorbell[me].sleep(kForeverNs, arrived)) break;
      lost += std::chrono::steady_clock::now() - begin >= std::chrono::nanoseconds(kForeverNs);
    }
  }
  return lost;
}

TEST(Doorbell, NoWakeUpIsLostBetweenThreads) {
  Shared shared{};
  int lost_by_peer = -1;
  std::thread peer([&] { lost_by_peer = play(shared, 1); });
  EXPECT_EQ(play(shared, 0), 0);
  peer.join();
  EXPECT_EQ(lost_by_peer, 0);
  EXPECT_EQ(shared.doorbell[0].sleepers, 0u);
  EXPECT_EQ(shared.doorbell[1].rung, kRounds);
}

TEST(Doorbell, NoWakeUpIsLostBetweenProcesses) {
  void* memory =
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto& shared = *static_cast<Shared*>(memory);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(play(shared, 1) == 0 ? 0 : 1);
  EXPECT_EQ(play(shared, 0), 0);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  munmap(memory, sizeof(Shared));
}

TEST(Doorbell, RingBeforeSleepIsNoticed) {
  Doorbell doorbell{};
  doorbell.rung = ~std::uint32_t{0};  // the next ring wraps
  bool rang = false;
  const auto begin = std::chrono::steady_clock::now();
  // The ring falls between the sleeper's look at its flags and its sleep.
  EXPECT_FALSE(doorbell.sleep(kForeverNs, [&] {
    doorbell.ring();
    rang = true;
    return false;
  }));
  EXPECT_TRUE(rang);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::nanoseconds(kForeverNs));
  EXPECT_EQ(doorbell.rung, 0u);
}

TEST(Doorbell, SleepEndsByItself) {
  Doorbell doorbell{};
  EXPECT_FALSE(doorbell.sleep(1'000'000, [] { return false; }));
}

TEST(Doorbell, WakesEveryThreadOfTheRank) {
  Doorbell doorbell{};
  EpochFlag flag{};
  const auto sleeper = [&] {
    const auto arrived = [&] { return flag.reached(1); };
    while (!arrived() && !doorbell.sleep(kForeverNs, arrived)) {
    }
  };
  const auto begin = std::chrono::steady_clock::now();
  std::thread first(sleeper), second(sleeper), third(sleeper);
  while (load_seq_cst(&doorbell.sleepers) < 3) std::this_thread::yield();
  flag.publish(1);
  doorbell.ring();
  first.join();
  second.join();
  third.join();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::nanoseconds(kForeverNs));
}

}  // namespace
}  // namespace deep_ep::protocol
