#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "deep_ep/bootstrap.hpp"
#include "deep_ep/error.hpp"

namespace deep_ep {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(BootstrapThreads, GathersInRankOrderAgainAndAgain) {
  const int size = 5;
  const auto ranks = bootstrap_threads(size);
  std::vector<std::thread> threads;
  for (const auto& bootstrap : ranks) {
    threads.emplace_back([&bootstrap] {
      for (int round = 0; round < 200; ++round) {
        const auto all =
            bootstrap->all_gather(std::string(bootstrap->rank() + round % 3, 'a' + round % 7));
        ASSERT_EQ(all.size(), 5u);
        for (int i = 0; i < 5; ++i) ASSERT_EQ(all[i], std::string(i + round % 3, 'a' + round % 7));
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

TEST(BootstrapThreads, OneRankNeedsNobody) {
  const auto ranks = bootstrap_threads(1);
  EXPECT_THAT(ranks[0]->all_gather("x"), ElementsAre("x"));
}

TEST(BootstrapThreads, MissingRankIsNamedToAllAndStaysMissing) {
  const auto ranks = bootstrap_threads(3, milliseconds(100));
  const auto expect_timeout = [&](int rank) {
    try {
      ranks[rank]->barrier();
      FAIL() << "did not throw";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kTimeout);
      EXPECT_THAT(error.ranks(), ElementsAre(1));
      EXPECT_THAT(error.what(), HasSubstr("rank 1 did not come"));
    }
  };
  std::thread other([&] { expect_timeout(2); });
  expect_timeout(0);
  other.join();
  expect_timeout(1);
}

TEST(BootstrapThreads, RankThatLeftIsNamedAtOnce) {
  auto ranks = bootstrap_threads(2);
  std::thread leaver([&] {
    std::this_thread::sleep_for(milliseconds(20));
    ranks[1].reset();
  });
  try {
    ranks[0]->barrier();
    ADD_FAILURE() << "did not throw";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kPeerFailed);
    EXPECT_THAT(error.ranks(), ElementsAre(1));
  }
  leaver.join();
}

TEST(BootstrapCallback, PassesBytesThroughAndChecksTheAnswer) {
  const auto good = bootstrap_callback(1, 2, [](std::string_view bytes) {
    return std::vector<std::string>{"other", std::string(bytes)};
  });
  EXPECT_EQ(good->rank(), 1);
  EXPECT_EQ(good->size(), 2);
  EXPECT_THAT(good->all_gather("mine"), ElementsAre("other", "mine"));
  const auto few =
      bootstrap_callback(0, 2, [](std::string_view) { return std::vector<std::string>{"one"}; });
  EXPECT_THROW(few->all_gather("x"), Error);
  const auto shuffled = bootstrap_callback(0, 2, [](std::string_view bytes) {
    return std::vector<std::string>{"other", std::string(bytes)};
  });
  EXPECT_THROW(shuffled->all_gather("mine"), Error);
  EXPECT_THROW(
      bootstrap_callback(2, 2, [](std::string_view) { return std::vector<std::string>(); }), Error);
}

}  // namespace
}  // namespace deep_ep
