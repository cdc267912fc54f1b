#include <gmock/gmock.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <vector>

#include "../multi/processes.hpp"
#include "base/error.hpp"
#include "heap_ranks.hpp"

namespace deep_ep::fabric {
namespace {

using Clock = std::chrono::steady_clock;

std::size_t threads() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<std::size_t>(std::distance(begin(tasks), end(tasks)));
}

/// The error of a call, which must be of a lost `rank`.
template <class Call>
void expect_peer_failed(int rank, Call&& call) {
  try {
    call();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kPeerFailed) << error.what();
    EXPECT_THAT(error.ranks(), ::testing::ElementsAre(rank)) << error.what();
  }
}

TEST(SymmetricHeapDeath, LeavesNoThreads) {
  in_ranks(3, [](Bootstrap& bootstrap) {
    const std::size_t before = threads();
    for (int turn = 0; turn < 3; ++turn) {
      {
        const auto heap = make_heap(bootstrap, 4096);
        EXPECT_GT(threads(), before);
        heap->signal((bootstrap.rank() + 1) % 3, 0, 1);
        EXPECT_EQ(await_word(*heap, 0, 1), 1u);
        bootstrap.barrier();
      }
      EXPECT_EQ(threads(), before);
    }
  });
}

TEST(SymmetricHeapDeath, KilledRankIsLostAndNamedAndTheOthersGoOn) {
  const auto exits = exits_of_ranks(3, [](Bootstrap& bootstrap) {
    const std::vector<char> source(1 << 20, 'x');
    std::atomic<int> rung = 0;
    auto heap = make_heap(bootstrap, 1 << 20, [&] {
      rung.fetch_add(1);
      rung.notify_all();
    });
    const int rank = bootstrap.rank();
    bootstrap.barrier();
    if (rank == 2) raise(SIGKILL);
    EXPECT_TRUE(await_loss(*heap, 2, milliseconds(20000)));
    rung.wait(0);
    const double before = cpu_seconds();
    std::this_thread::sleep_for(milliseconds(500));
    EXPECT_LT(cpu_seconds() - before, 0.25);  // who does not sleep takes it all
    expect_peer_failed(2, [&] { heap->put(2, 0, source.data(), 64); });
    expect_peer_failed(2, [&] { heap->signal(2, 0, 1); });
    expect_peer_failed(2, [&] { heap->flush(2, milliseconds(1000)); });
    const int other = 1 - rank;
    EXPECT_FALSE(heap->lost(other));
    heap->put(other, 64, source.data(), 1000);
    heap->signal(other, 0, 1);
    EXPECT_EQ(await_word(*heap, 0, 1), 1u);
    EXPECT_EQ(heap->base()[1063], std::byte{'x'});
    const auto begin = Clock::now();
    heap.reset();
    EXPECT_LT(Clock::now() - begin, kEnd);
  });
  for (const auto& exit : exits) EXPECT_EQ(exit.status, exit.rank == 2 ? 128 + SIGKILL : 0);
}

TEST(SymmetricHeapDeath, KilledWhileBytesAreUnderWayEndsAllCalls) {
  const auto exits = exits_of_ranks(3, [](Bootstrap& bootstrap) {
    constexpr std::int64_t kBytes = 4 << 20;
    const std::vector<char> source(kBytes, 'x');
    const auto heap = make_heap(bootstrap, kBytes + 128);
    const int rank = bootstrap.rank();
    bootstrap.barrier();
    const auto begin = Clock::now();
    // Rank 2 dies amid what the others send to it, and what it sends to them.
    std::thread death([rank] {
      if (rank != 2) return;
      std::this_thread::sleep_for(milliseconds(100));
      raise(SIGKILL);
    });
    const int to = rank == 2 ? 0 : 2;
    try {
      for (std::uint64_t turn = 1;; ++turn) {
        heap->put(to, 0, source.data(), kBytes);
        heap->signal(to, kBytes + 8 * rank, turn);
        EXPECT_TRUE(heap->flush(to, 2 * kEnd));
      }
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kPeerFailed) << error.what();
      EXPECT_THAT(error.ranks(), ::testing::ElementsAre(2)) << error.what();
    }
    EXPECT_LT(Clock::now() - begin, kEnd);
    death.join();
  });
  for (const auto& exit : exits) EXPECT_EQ(exit.status, exit.rank == 2 ? 128 + SIGKILL : 0);
}

TEST(SymmetricHeapDeath, StoppedRankIsWaitedForNoLongerThanAsked) {
  const auto exits = exits_of_ranks(2, [](Bootstrap& bootstrap) {
    constexpr std::int64_t kBytes = 32 << 20;  // more than sockets hold
    const std::vector<char> source(kBytes, 'x');
    auto heap = make_heap(bootstrap, kBytes);
    const auto pids = bootstrap.all_gather(std::to_string(getpid()));
    if (bootstrap.rank() == 1) {
      raise(SIGSTOP);
      _exit(0);
    }
    while (!is_stopped(pids[1])) std::this_thread::sleep_for(milliseconds(10));
    heap->put(1, 0, source.data(), kBytes);
    const auto begin = Clock::now();
    const double before = cpu_seconds();
    EXPECT_FALSE(heap->flush(1, milliseconds(1000)));
    EXPECT_LT(cpu_seconds() - before, 0.4);
    EXPECT_FALSE(heap->lost(1));
    heap.reset();
    EXPECT_LT(Clock::now() - begin, kEnd);
    kill(std::stoi(pids[1]), SIGKILL);
  });
  EXPECT_EQ(exits[0].status, 0);
  EXPECT_EQ(exits[1].status, 128 + SIGKILL);
}

}  // namespace
}  // namespace deep_ep::fabric
