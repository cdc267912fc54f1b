#include "contract/pool.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>

#include "deep_ep/error.hpp"

namespace deep_ep::test {
namespace {

using std::chrono_literals::operator""s;
using std::chrono_literals::operator""ms;

std::string play(Worker& worker, const std::string& job) {
  static int jobs = 0;
  ++jobs;
  if (job == "count") return std::to_string(jobs);
  if (job == "throw") throw Error(ErrorCode::kUsage, "thrown by the work");
  if (job == "die" && worker.rank() == 1) raise(SIGKILL);
  if (job == "hang" && worker.rank() == 0) pause();
  std::string all;
  for (const std::string& part : worker.bootstrap()->all_gather(std::to_string(worker.rank())))
    all += part;
  return all;
}

TEST(Pool, RanksGatherAmongThemselves) {
  Pool pool(4, play);
  for (int ranks : {4, 2, 3, 1}) {
    for (const Outcome& outcome : pool.run(ranks, "gather", 10s))
      EXPECT_EQ(outcome.answer, std::string("0123").substr(0, static_cast<std::size_t>(ranks)));
  }
}

TEST(Pool, ProcessesLiveFromJobToJob) {
  Pool pool(2, play);
  for (int jobs = 1; jobs < 4; ++jobs) {
    for (const Outcome& outcome : pool.run(2, "count", 10s))
      EXPECT_EQ(outcome.answer, std::to_string(jobs));
  }
}

TEST(Pool, AnExceptionIsAnOutcome) {
  Pool pool(1, play);
  const auto outcomes = pool.run(1, "throw", 10s);
  EXPECT_FALSE(outcomes[0].answered);
  EXPECT_EQ(outcomes[0].failure, "thrown by the work");
}

TEST(Pool, ADeadRankIsNamedAndReplaced) {
  Pool pool(3, play);
  const auto outcomes = pool.run(3, "die", 10s);
  EXPECT_EQ(outcomes[1].signal, SIGKILL);
  EXPECT_EQ(outcomes[0].failure, "rank 1 left the job");
  EXPECT_TRUE(pool.has_fresh_ranks());
  EXPECT_EQ(pool.run(3, "gather", 10s)[1].answer, "012");
  EXPECT_FALSE(pool.has_fresh_ranks());
}

TEST(Pool, AHangEndsWithTheLimit) {
  Pool pool(2, play);
  const auto outcomes = pool.run(2, "hang", 200ms);
  EXPECT_TRUE(outcomes[0].timed_out);
  EXPECT_EQ(pool.run(2, "gather", 10s)[0].answer, "01");
}

}  // namespace
}  // namespace deep_ep::test
