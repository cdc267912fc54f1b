#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <sstream>
#include <string>

#include <CLI/CLI.hpp>

#include "contract/suite.hpp"
#include "fuzz/arguments.hpp"

// Random programs, resumable by seed: `fuzz exchange` and `fuzz low-latency` run random exchanges
// on a pool of ranks,
// `fuzz arguments` calls with random wrong arguments.

namespace deep_ep::test {
namespace {

struct Range {
  std::int64_t from = 0;
  std::int64_t count = 1'000'000'000;
  double seconds = 20;
};

/// Which programs are drawn.
struct Kind {
  bool low_latency = false;
  bool several_nodes = false;
  Limits limits{};
};

class RandomPrograms final : public ProgramSource {
 public:
  explicit RandomPrograms(const Kind& kind) : kind_(kind) {}
  std::int64_t size() const override { return INT64_MAX; }
  Program at(std::int64_t i) const override {
    const auto seed = static_cast<std::uint64_t>(i);
    return kind_.low_latency ? random_low_latency_program(seed, kind_.limits, kind_.several_nodes)
                             : random_program(seed, kind_.limits, kind_.several_nodes);
  }

 private:
  Kind kind_;
};

int fuzz_exchanges(const Kind& kind, const Range& range, const Target& target) {
  SuiteOptions options;
  options.from = range.from;
  options.count = range.count;
  options.max_seconds = range.seconds;
  options.replay = fmt::format("fuzz {} --backend {} --mebibytes {} --max-ranks {}{}",
                               kind.low_latency ? "low-latency" : "exchange",
                               target.device.type == DeviceType::kCuda ? "cuda" : "host",
                               kind.limits.bytes >> 20, kind.limits.max_ranks,
                               kind.several_nodes ? " --several-nodes" : "");
  return run_suite(RandomPrograms(kind), target, options);
}

/// Jobs "first last": one seed after the other in one process.
std::string play_arguments(Worker& worker, const std::string& job) {
  static ArgumentFuzzer fuzzer;
  std::istringstream in(job);
  std::uint64_t first = 0;
  std::uint64_t last = 0;
  in >> first >> last;
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    const std::string wrong = fuzzer.run(worker, seed);
    if (!wrong.empty()) return fmt::format("seed {}: {}", seed, wrong);
  }
  return fmt::format("={} accepted, {} refused", fuzzer.accepted(), fuzzer.refused());
}

int fuzz_arguments(const Range& range, const std::string& command) {
  constexpr std::int64_t kSeedsAJob = 64;
  constexpr auto kLimit = std::chrono::seconds(60);
  Pool pool(1, play_arguments);
  const auto begin = std::chrono::steady_clock::now();
  const std::int64_t end = range.from + range.count;
  std::int64_t seed = range.from;
  std::string counts;
  while (seed < end &&
         std::chrono::steady_clock::now() - begin < std::chrono::duration<double>(range.seconds)) {
    const std::int64_t last = std::min(seed + kSeedsAJob, end) - 1;
    const Outcome outcome = pool.run(1, fmt::format("{} {}", seed, last), kLimit)[0];
    if (!outcome.answered) {
      fmt::print("FAILED: {}; one of the seeds of: {} --from {} --count {}\n",
                 outcome.timed_out ? "hangs" : outcome.failure, command, seed, last - seed + 1);
      // What ended the process says nothing of the seed: look for it one by one.
      for (std::int64_t one = seed; one <= last; ++one) {
        if (!pool.run(1, fmt::format("{} {}", one, one), kLimit)[0].answered)
          fmt::print("  fails alone too: {} --from {} --count 1\n", command, one);
      }
      return 1;
    }
    if (!outcome.answer.starts_with('=')) {
      fmt::print("FAILED {}\n  repeat: {} --from {} --count {}\n", outcome.answer, command, seed,
                 kSeedsAJob);
      return 1;
    }
    counts = outcome.answer.substr(1);
    seed = last + 1;
  }
  fmt::print("seeds {} to {}: {}\n1 passed, 0 failed, 0 skipped\n", range.from, seed - 1, counts);
  return 0;
}

}  // namespace
}  // namespace deep_ep::test

int main(int argc, char** argv) {
  using namespace deep_ep::test;
  CLI::App app{"Random programs of calls. A failure prints the seed that repeats it."};
  app.require_subcommand(1);
  Range range;
  Kind kind;
  std::int64_t mebibytes = 64;
  CLI::App* exchange = app.add_subcommand("exchange", "random exchanges against the reference");
  CLI::App* low_latency = app.add_subcommand("low-latency", "the same with low latency");
  std::string backend = "host";
  for (CLI::App* one : {exchange, low_latency}) {
    one->add_option("--backend", backend)
        ->check(CLI::IsMember({"host", "cuda"}))
        ->capture_default_str();
    one->add_option("--mebibytes", mebibytes, "memory of a program")->capture_default_str();
    one->add_option("--max-ranks", kind.limits.max_ranks)->capture_default_str();
    one->add_flag("--several-nodes", kind.several_nodes, "ranks of this machine pose as nodes");
  }
  CLI::App* arguments = app.add_subcommand("arguments", "random wrong arguments");
  for (CLI::App* one : {exchange, low_latency, arguments}) {
    one->add_option("--from", range.from, "first seed")->capture_default_str();
    one->add_option("--count", range.count, "seeds at most")->capture_default_str();
    one->add_option("--seconds", range.seconds, "time at most")->capture_default_str();
  }
  CLI11_PARSE(app, argc, argv);
  kind.limits.bytes = mebibytes << 20;
  kind.low_latency = low_latency->parsed();
  if (arguments->parsed()) return fuzz_arguments(range, fmt::format("{} arguments", argv[0]));
  Target target;
  if (backend == "cuda") target.device.type = deep_ep::DeviceType::kCuda;
  return fuzz_exchanges(kind, range, target);
}
