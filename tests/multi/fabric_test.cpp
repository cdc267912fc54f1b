#include "fabric/fabric.hpp"

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "deep_ep/error.hpp"
#include "fabric_ranks.hpp"

namespace deep_ep::fabric {
namespace {

using ::testing::HasSubstr;

TEST(Fabric, RanksReadAndWriteEachOthersSegments) {
  for (const int size : {1, 2, 5, 8}) {
    in_ranks(size, [size](Bootstrap& bootstrap) {
      constexpr std::size_t kWords = 1 << 16;
      JoinedRank self(bootstrap, kWords * sizeof(std::uint32_t));
      fill(self.fabric, 0, kWords);
      bootstrap.barrier();
      for (int i = 0; i < size; ++i) expect_filled(self.fabric, i, 0, kWords);
      bootstrap.barrier();
      // Each rank writes its own word into everybody's segment.
      for (int i = 0; i < size; ++i)
        reinterpret_cast<std::uint32_t*>(self.fabric.base(i, 0))[self.fabric.rank()] =
            100 * i + self.fabric.rank();
      bootstrap.barrier();
      const auto* mine = reinterpret_cast<std::uint32_t*>(self.fabric.base(self.fabric.rank(), 0));
      for (int i = 0; i < size; ++i)
        EXPECT_EQ(mine[i], static_cast<std::uint32_t>(100 * self.fabric.rank() + i));
      bootstrap.barrier();
    });
  }
}

TEST(Fabric, SegmentsAddedWhileRunningAppearAtAllPeers) {
  in_ranks(4, [](Bootstrap& bootstrap) {
    JoinedRank self(bootstrap);
    constexpr int kThreads = 3;
    constexpr int kEach = 20;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < kEach; ++i) fill(self.fabric, self.fabric.add_segment(8192), 2048);
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(self.fabric.num_own_segments(), 1 + kThreads * kEach);
    EXPECT_EQ(self.fabric.own_bytes(), 4096 + kThreads * kEach * 8192);
    bootstrap.barrier();
    for (int rank = 0; rank < 4; ++rank) {
      for (int segment = 1; segment <= kThreads * kEach; ++segment) {
        ASSERT_TRUE(self.reports.wait(milliseconds(20000),
                                      [&] { return self.fabric.base(rank, segment) != nullptr; }));
        expect_filled(self.fabric, rank, segment, 2048);
      }
      EXPECT_EQ(self.fabric.base(rank, 1 + kThreads * kEach), nullptr);
    }
    bootstrap.barrier();
  });
}

TEST(Fabric, SegmentsAddedBeforeOpeningAreThereWhenItReturns) {
  in_ranks(3, [](Bootstrap& bootstrap) {
    Fabric fabric(bootstrap.rank(), 3, make_memfd_memory());
    for (int i = 0; i < 5 + bootstrap.rank(); ++i) fill(fabric, fabric.add_segment(4096), 1024);
    fabric.open_handles(bootstrap.all_gather(fabric.export_handles()), milliseconds(20000), {});
    for (int rank = 0; rank < 3; ++rank) {
      for (int i = 0; i < 5 + rank; ++i) expect_filled(fabric, rank, i, 1024);
    }
    bootstrap.barrier();
  });
}

TEST(Fabric, GoodbyeIsReportedAsOrderly) {
  in_ranks(3, [](Bootstrap& bootstrap) {
    JoinedRank self(bootstrap);
    bootstrap.barrier();
    if (bootstrap.rank() != 1) {
      EXPECT_EQ(self.reports.gone(1, milliseconds(10000)), true);
      // What it shared stays mapped.
      EXPECT_NE(self.fabric.base(1, 0), nullptr);
    } else {
      self.fabric.close();
      self.fabric.close();
    }
    bootstrap.barrier();
  });
}

TEST(Fabric, StoppedPeerBlocksNobodyAndCatchesUp) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    JoinedRank self(bootstrap);
    const pid_t peer = std::stoi(bootstrap.all_gather(std::to_string(getpid()))[1]);
    // More announcements than a socket holds, fewer files than a process may usually open.
    constexpr int kSegments = 400;
    if (bootstrap.rank() == 0) {
      kill(peer, SIGSTOP);
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < kSegments; ++i) self.fabric.add_segment(4096);
      EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
      fill(self.fabric, kSegments, 1024);
      kill(peer, SIGCONT);
    }
    bootstrap.barrier();
    ASSERT_TRUE(self.reports.wait(milliseconds(10000), [&] {
      for (int i = 0; i <= kSegments; ++i) {
        if (self.fabric.base(0, i) == nullptr) return false;
      }
      return true;
    }));
    expect_filled(self.fabric, 0, kSegments, 1024);
    bootstrap.barrier();
  });
}

TEST(Fabric, ShortageIsAnErrorWithSizesAndLeavesItUsable) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    JoinedRank self(bootstrap);
    try {
      self.fabric.add_segment(std::int64_t{1} << 50);
      ADD_FAILURE() << "did not throw";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
      EXPECT_THAT(error.what(), HasSubstr("1125899906842624 bytes"));
    }
    fill(self.fabric, self.fabric.add_segment(4096), 1024);
    bootstrap.barrier();
    const int peer = 1 - self.fabric.rank();
    ASSERT_TRUE(self.reports.wait(milliseconds(5000),
                                  [&] { return self.fabric.base(peer, 1) != nullptr; }));
    expect_filled(self.fabric, peer, 1, 1024);
    bootstrap.barrier();
  });
}

TEST(Fabric, PeerThatNeverConnectsIsNamed) {
  in_ranks(3, [](Bootstrap& bootstrap) {
    Fabric fabric(bootstrap.rank(), 3, make_memfd_memory());
    fabric.add_segment(4096);
    const auto exported = bootstrap.all_gather(fabric.export_handles());
    if (bootstrap.rank() == 2) {
      bootstrap.barrier();
      return;
    }
    try {
      fabric.open_handles(exported, milliseconds(3000), {});
      ADD_FAILURE() << "did not throw";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kTimeout);
      EXPECT_THAT(error.ranks(), ::testing::ElementsAre(2)) << error.what();
      EXPECT_THAT(error.what(), HasSubstr("rank 2"));
    }
    bootstrap.barrier();
  });
}

TEST(Fabric, ForkedChildOfARankCannotSpeakForIt) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    JoinedRank self(bootstrap);
    if (bootstrap.rank() == 1) {
      const pid_t child = fork();
      if (child == 0) {
        self.fabric.close();
        _exit(0);
      }
      int status = -1;
      waitpid(child, &status, 0);
      EXPECT_EQ(status, 0);
    }
    bootstrap.barrier();
    EXPECT_EQ(self.reports.gone(1 - self.fabric.rank(), milliseconds(100)), std::nullopt);
    bootstrap.barrier();
  });
}

}  // namespace
}  // namespace deep_ep::fabric
