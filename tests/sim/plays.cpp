#include "plays.hpp"

#include <gtest/gtest.h>

#include <string>
#include <thread>

#include "baton_scheduler.hpp"
#include "deep_ep/error.hpp"

namespace deep_ep::sim {

void on_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

void count_time_in_turns(const Buffers& buffers, std::chrono::milliseconds timeout) {
  for (const auto& buffer : buffers) buffer->set_timeout(timeout);
}

void play_in_turns(const Program& program, const Buffers& buffers, std::uint64_t seed) {
  std::vector<std::int64_t> wrong(program.num_ranks, -1);
  std::vector<std::function<void()>> ranks;
  for (int rank = 0; rank < program.num_ranks; ++rank)
    ranks.push_back([&, rank] {
      try {
        wrong[rank] = program.play(*buffers[rank]);
      } catch (const Error& error) {
        ADD_FAILURE() << error.what();
      }
    });
  BatonScheduler scheduler(seed);
  scheduler.run(ranks);
  EXPECT_EQ(wrong, std::vector<std::int64_t>(program.num_ranks));
}

void play_freely(const Program& program, const Buffers& buffers) {
  std::vector<std::int64_t> wrong(program.num_ranks, -1);
  on_threads(program.num_ranks, [&](int rank) { wrong[rank] = program.play(*buffers[rank]); });
  EXPECT_EQ(wrong, std::vector<std::int64_t>(program.num_ranks));
}

void play_until_stopped(const Program& program, const Buffers& buffers, std::uint64_t seed,
                        int stopped, int points) {
  std::vector<std::string> errors(program.num_ranks);
  std::vector<std::function<void()>> ranks;
  for (int rank = 0; rank < program.num_ranks; ++rank) {
    ranks.push_back([&, rank] {
      try {
        // Until the stopped rank is missed: it may stop behind its last part in a program.
        for (;;) EXPECT_EQ(program.play(*buffers[rank]), 0);
      } catch (const Error& error) {
        errors[rank] = error.what();
        EXPECT_TRUE(error.code() == ErrorCode::kTimeout) << error.what();
        EXPECT_FALSE(error.ranks().empty()) << error.what();
        EXPECT_THROW(buffers[rank]->barrier(), Error);
      }
    });
  }
  BatonScheduler scheduler(
      seed, {.stop_rank = stopped, .stop_at_point = 1 + static_cast<int>(seed * 31 % points)});
  scheduler.run(ranks);
  EXPECT_TRUE(scheduler.stopped(stopped));
  const std::string name = "rank " + std::to_string(stopped) + " expected";
  int naming = 0;
  for (int rank = 0; rank < program.num_ranks; ++rank) {
    EXPECT_EQ(errors[rank].empty(), rank == stopped) << "rank " << rank;
    naming += errors[rank].find(name) != std::string::npos;
  }
  EXPECT_GT(naming, 0) << "stopped " << stopped << "; all: " << testing::PrintToString(errors);
}

}  // namespace deep_ep::sim
