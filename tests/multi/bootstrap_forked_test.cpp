#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <thread>

#include "deep_ep/error.hpp"
#include "in_ranks.hpp"
#include "processes.hpp"

namespace deep_ep {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

void expect_no_children() {
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1);
  EXPECT_EQ(errno, ECHILD);
}

TEST(RunForked, GathersInRankOrderForOneToEightRanks) {
  for (const int size : {1, 2, 3, 8}) {
    in_ranks(size, [size](Bootstrap& bootstrap) {
      EXPECT_EQ(bootstrap.size(), size);
      for (int round = 0; round < 50; ++round) {
        const auto all = bootstrap.all_gather(std::string(bootstrap.rank() * 10 + round, 'x'));
        ASSERT_EQ(all.size(), static_cast<std::size_t>(size));
        for (int i = 0; i < size; ++i) ASSERT_EQ(all[i], std::string(i * 10 + round, 'x'));
      }
    });
  }
  expect_no_children();
}

TEST(RunForked, BytesMayBeManyAndOfAnyValue) {
  in_ranks(3, [](Bootstrap& bootstrap) {
    std::string bytes(3 << 20, '\0');
    for (std::size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = static_cast<char>(i * 31 + bootstrap.rank());
    const auto all = bootstrap.all_gather(bytes);
    for (int r = 0; r < 3; ++r) {
      for (std::size_t i = 0; i < all[r].size(); ++i)
        ASSERT_EQ(all[r][i], static_cast<char>(i * 31 + r));
    }
  });
}

TEST(RunForked, ReportsStatusExceptionAndSignalByRank) {
  const auto exits = run_forked(5, [](const std::shared_ptr<Bootstrap>& bootstrap) {
    switch (bootstrap->rank()) {
      case 1:
        return 7;
      case 2:
        throw std::runtime_error("expected in this test");
      case 3:
        raise(SIGKILL);
        return 0;
      case 4:
        return 256;
      default:
        return 0;
    }
  });
  std::vector<int> statuses;
  for (const auto& exit : exits) statuses.push_back(exit.status);
  EXPECT_THAT(statuses, ElementsAre(0, 7, 1, 128 + SIGKILL, 1));
  expect_no_children();
}

TEST(RunForked, DeadRankIsNamedToAllOthersAtOnce) {
  const auto exits = exits_of_ranks(4, [](Bootstrap& bootstrap) {
    if (bootstrap.rank() == 2) _exit(9);
    try {
      bootstrap.barrier();
      ADD_FAILURE() << "did not throw";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kPeerFailed);
      EXPECT_THAT(error.ranks(), ElementsAre(2)) << error.what();
    }
    EXPECT_THROW(bootstrap.barrier(), Error);
  });
  for (const auto& exit : exits) EXPECT_EQ(exit.status, exit.rank == 2 ? 9 : 0);
}

TEST(RunForked, DeadRootIsNamed) {
  const auto exits = exits_of_ranks(3, [](Bootstrap& bootstrap) {
    if (bootstrap.rank() == 0) _exit(9);
    try {
      bootstrap.barrier();
      ADD_FAILURE() << "did not throw";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kPeerFailed);
      EXPECT_THAT(error.ranks(), ElementsAre(0));
    }
  });
  EXPECT_EQ(exits[1].status, 0);
  EXPECT_EQ(exits[2].status, 0);
}

TEST(RunForked, SilentRankIsNamedAfterTheTimeout) {
  setenv("DEEP_EP_TIMEOUT_MS", "2000", 1);
  Gate thrown;
  in_ranks(4, [&](Bootstrap& bootstrap) {
    if (bootstrap.rank() == 3) return thrown.wait(3);
    try {
      bootstrap.barrier();
      ADD_FAILURE() << "did not throw";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kTimeout);
      EXPECT_THAT(error.ranks(), ElementsAre(3)) << error.what();
      EXPECT_THAT(error.what(), HasSubstr("rank 3 did not come"));
    }
    thrown.open();
  });
  unsetenv("DEEP_EP_TIMEOUT_MS");
}

TEST(RunForked, StartedSeesThePidsInRankOrder) {
  std::vector<int> pids;
  const auto exits = exits_of_ranks(
      3,
      [](Bootstrap& bootstrap) {
        bootstrap.barrier();
        if (bootstrap.rank() == 1) pause();
      },
      [&](std::span<const int> started) {
        pids.assign(started.begin(), started.end());
        kill(pids[1], SIGTERM);
      });
  ASSERT_EQ(pids.size(), 3u);
  EXPECT_EQ(exits[1].status, 128 + SIGTERM);
}

TEST(RunForked, RanksDieWithTheirParent) {
  int pipe_ends[2];
  ASSERT_EQ(pipe(pipe_ends), 0);
  const pid_t parent = fork();
  if (parent == 0) {
    run_forked(2, [&](const std::shared_ptr<Bootstrap>&) {
      (void)!write(pipe_ends[1], "x", 1);
      while (true) pause();
      return 0;
    });
    _exit(0);
  }
  close(pipe_ends[1]);
  char byte = 0;
  for (int i = 0; i < 2; ++i) ASSERT_EQ(read(pipe_ends[0], &byte, 1), 1);
  kill(parent, SIGKILL);
  waitpid(parent, nullptr, 0);
  // The pipe ends when the last rank that holds it is gone.
  EXPECT_EQ(read(pipe_ends[0], &byte, 1), 0);
  close(pipe_ends[0]);
}

}  // namespace
}  // namespace deep_ep
