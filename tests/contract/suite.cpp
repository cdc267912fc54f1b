#include "contract/suite.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <set>

#include "contract/choice.hpp"
#include "contract/network_plan.hpp"
#include "contract/pool.hpp"

namespace deep_ep::test {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPoolRanks = 8;
/// A rank whose Buffer did not fault in time is stuck; several waits may run out one by one.
constexpr int kTimeoutsAProgram = 4;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

class Suite {
 public:
  Suite(const ProgramSource& source, const Target& target, const SuiteOptions& options)
      : source_(source),
        options_(options),
        limit_(target.timeout * kTimeoutsAProgram),
        target_(target) {}

  int run() {
    const auto begin = Clock::now();
    const std::int64_t end = options_.count < 0
                                 ? source_.size()
                                 : std::min(source_.size(), options_.from + options_.count);
    choice_.emplace(source_, options_.from, end, options_.every);
    if (options_.one_world) {
      for (int ranks = 1; ranks <= kPoolRanks; ++ranks) run_programs(begin, end, ranks);
    } else {
      run_programs(begin, end, 0);
    }
    for (const std::string& reason : reasons_) fmt::print("skipped: {}\n", reason);
    if (options_.sent_bytes)
      fmt::print("devices sent {:.1f} MB, {:.1f} MB of them rows\n", sent_ / 1e6, planned_ / 1e6);
    fmt::print("ran for {:.1f} s\n{} passed, {} failed, {} skipped\n", seconds_since(begin),
               passed_, failed_, skipped_);
    if (passed_ + failed_ + skipped_ == 0) fmt::print("no program was selected\n");
    return failed_ == 0 && passed_ + skipped_ > 0 ? 0 : 1;
  }

 private:
  /// Those of `ranks` ranks; 0: all.
  void run_programs(Clock::time_point begin, std::int64_t end, int ranks) {
    pool_.reset();
    for (std::int64_t i = options_.from; i < end; ++i) {
      if (!choice_->has(i)) continue;
      const Program program = source_.at(i);
      if (program.name.find(options_.filter) == std::string::npos) continue;
      if (ranks != 0 && program.ranks != ranks) continue;
      if (options_.max_seconds > 0 && seconds_since(begin) > options_.max_seconds) {
        fmt::print("time is up before program {}: go on with --from {}\n", i, i);
        return;
      }
      if (pool_ == nullptr || (ranks != 0 && broken_)) start(ranks == 0 ? kPoolRanks : ranks);
      run_one(i, program);
    }
  }

  void start(int ranks) {
    pool_.reset();
    pool_ = std::make_unique<Pool>(
        ranks, [&source = source_, runner = std::make_shared<Runner>(target_)](
                   Worker& worker, const std::string& job) {
          std::size_t number_ends = 0;
          const std::int64_t number = std::stoll(job, &number_ends);
          return runner->run(worker, source.at(number), std::stoll(job.substr(number_ends)));
        });
  }

  void run_one(std::int64_t i, const Program& program) {
    const auto begin = Clock::now();
    if (broken_ || pool_->has_fresh_ranks()) {
      ++generation_;
      history_begin_ = i;
    }
    broken_ = false;
    const std::int64_t sent_before = options_.sent_bytes ? options_.sent_bytes() : 0;
    const auto outcomes = pool_->run(program.ranks, fmt::format("{} {}", i, generation_), limit_);
    std::string wrong;
    bool skipped = false;
    for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
      const Outcome& outcome = outcomes[rank];
      if (outcome.answer == Runner::kPassed) continue;
      if (outcome.answer.starts_with(Runner::kSkipped)) {
        skipped = true;
        reasons_.insert(outcome.answer.substr(std::string(Runner::kSkipped).size()));
        continue;
      }
      wrong += fmt::format("\n  rank {}: {}", rank,
                           outcome.timed_out
                               ? fmt::format("hangs: no answer within {} ms", limit_.count())
                               : outcome.answer + outcome.failure);
    }
    if (wrong.empty() && !skipped && options_.sent_bytes)
      wrong = compare_with_plan(program, options_.sent_bytes() - sent_before);
    if (wrong.empty()) {
      ++(skipped ? skipped_ : passed_);
      if (isatty(STDOUT_FILENO) != 0)
        fmt::print("\r\033[K{} {} ({:.2f} s)", i, program.name, seconds_since(begin));
      if (seconds_since(begin) > 10)
        fmt::print("slow: {} {} took {:.1f} s\n", i, program.name, seconds_since(begin));
      std::fflush(stdout);
      return;
    }
    ++failed_;
    broken_ = true;
    fmt::print(
        "FAILED {} {}{}\n  repeat alone:        {} --from {} --count 1\n"
        "  with its history:    {} --from {} --count {}\n",
        i, program.summary(), wrong, options_.replay, i, options_.replay, history_begin_,
        i - history_begin_ + 1);
    std::fflush(stdout);
  }

  /// What did not cross the devices that should have gone between nodes went some other way.
  std::string compare_with_plan(const Program& program, std::int64_t sent) {
    const std::int64_t planned = bytes_between_nodes(program);
    sent_ += static_cast<double>(sent);
    planned_ += static_cast<double>(planned);
    return sent >= planned ? ""
                           : fmt::format("\n  devices sent {} bytes, rows that cross are {} bytes",
                                         sent, planned);
  }

  const ProgramSource& source_;
  SuiteOptions options_;
  std::optional<Choice> choice_;
  double sent_ = 0;  // of the devices, in programs that passed
  double planned_ = 0;
  std::chrono::milliseconds limit_;
  Target target_;
  std::unique_ptr<Pool> pool_;
  bool broken_ = false;
  std::int64_t generation_ = 0;  // of all ranks' Buffers
  std::int64_t history_begin_ = 0;
  std::int64_t passed_ = 0;
  std::int64_t failed_ = 0;
  std::int64_t skipped_ = 0;
  std::set<std::string> reasons_;
};

}  // namespace

int run_suite(const ProgramSource& source, const Target& target, const SuiteOptions& options) {
  return Suite(source, target, options).run();
}

}  // namespace deep_ep::test
