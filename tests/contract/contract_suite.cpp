#include <fmt/format.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "contract/suite.hpp"
#include "namespaces.hpp"

// The contract suite: every backend and mode must give what plan/reference gives, bit for bit.

namespace deep_ep::test {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

class ProgramList final : public ProgramSource {
 public:
  ProgramList(const std::string& mode, std::uint64_t seed, bool full)
      : programs_(corners(mode, full)) {
    // Sanitizers take their time, and so do Buffers over a network.
    const int rounds = full ? 16 : kSanitized || mode.starts_with("internode") ? 1 : 3;
    for (int round = 0; round < rounds; ++round) {
      for (Program& program :
           covering(mode, seed + static_cast<std::uint64_t>(round), limits(mode, full)))
        programs_.push_back(std::move(program));
    }
  }
  std::int64_t size() const override { return static_cast<std::int64_t>(programs_.size()); }
  Program at(std::int64_t i) const override { return programs_.at(static_cast<std::size_t>(i)); }

 private:
  static std::vector<Program> corners(const std::string& mode, bool full) {
    if (mode == "intranode") return corner_programs(limits(mode, full));
    if (mode == "internode") return internode_corner_programs(limits(mode, full));
    std::vector<Program> programs = low_latency_corner_programs(limits(mode, full));
    if (mode == "low-latency") return programs;
    if (!full) {  // the covering array has these formats as well
      std::erase_if(programs, [](const Program& program) {
        return program.name.find("/home_in_") != std::string::npos;
      });
    }
    return spread_over_nodes(std::move(programs));
  }
  static std::vector<Program> covering(const std::string& mode, std::uint64_t seed,
                                       const Limits& limits) {
    if (mode == "low-latency") return low_latency_covering_programs(seed, limits);
    if (mode == "internode-low-latency")
      return spread_over_nodes(low_latency_covering_programs(seed, limits));
    return covering_programs(seed, limits, mode == "internode");
  }
  /// 1 GiB is what the smallest machines that run the whole suite have to spare.
  static Limits limits(const std::string& mode, bool full) {
    Limits limits;
    limits.bytes = std::int64_t{full ? 1024 : 512} << 20;
    // There is a mirror, and rings: less, for a shorter run.
    if (mode == "internode-low-latency") limits.bytes /= 4;
    return limits;
  }

  std::vector<Program> programs_;
};

struct Settings {
  std::string backend = "host";
  std::string mode = "intranode";
  std::uint64_t seed = 1;
  std::int64_t timeout_ms = 20'000;
  std::string combine{};
  std::string inbox_bytes{};
  bool full = false;
  bool list = false;
  bool namespaces = false;
  SuiteOptions suite{};
};

void add_options(CLI::App& app, Settings& settings) {
  app.add_option("--backend", settings.backend)
      ->check(CLI::IsMember({"host", "cuda"}))
      ->capture_default_str();
  app.add_option("--mode", settings.mode)
      ->check(CLI::IsMember({"intranode", "internode", "low-latency", "internode-low-latency"}))
      ->capture_default_str();
  app.add_option("--seed", settings.seed, "of the covering array and the inputs")
      ->capture_default_str();
  app.add_option("--from", settings.suite.from, "first program")->capture_default_str();
  app.add_option("--count", settings.suite.count, "number of programs, -1: all")
      ->capture_default_str();
  app.add_option("--every", settings.suite.every,
                 "one program in so many, and those without which a value would be missing")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--filter", settings.suite.filter, "only programs whose name contains this");
  app.add_option("--combine", settings.combine, "how combine fetches rows: auto, pull or ring");
  app.add_option("--inbox-bytes", settings.inbox_bytes, "DEEP_EP_INBOX_BYTES of the ranks");
  app.add_option("--timeout-ms", settings.timeout_ms, "of each wait")->capture_default_str();
  app.add_option("--seconds", settings.suite.max_seconds, "stop after so long; 0: no limit");
  app.add_flag("--full", settings.full,
               "all programs, more of them, with up to 1 GiB each (or DEEP_EP_TEST_FULL=1)");
  app.add_flag("--namespaces", settings.namespaces,
               "nodes are network namespaces, as root; else ranks of this machine pose as nodes");
  app.add_flag("--list", settings.list, "print the programs and run none");
}

/// For ranks that are forked later.
void pass_on(Settings& settings, const char* flag, const char* variable, const std::string& value) {
  if (value.empty()) return;
  setenv(variable, value.c_str(), 1);
  settings.suite.replay += fmt::format(" {} {}", flag, value);
}

int run(Settings& settings, const char* program) {
  SuiteOptions& suite = settings.suite;
  const ProgramList programs(settings.mode, settings.seed, settings.full);
  if (settings.list) {
    for (std::int64_t i = 0; i < programs.size(); ++i)
      fmt::print("{} {}\n", i, programs.at(i).describe());
    return 0;
  }
  Target target;
  target.device.type = settings.backend == "cuda" ? DeviceType::kCuda : DeviceType::kHost;
  target.timeout = std::chrono::milliseconds(settings.timeout_ms);
  suite.one_world = settings.backend == "cuda" && settings.mode.starts_with("internode");
  suite.replay = fmt::format("{} --backend {} --mode {} --seed {}{}{}", program, settings.backend,
                             settings.mode, settings.seed, settings.full ? " --full" : "",
                             settings.namespaces ? " --namespaces" : "");
  std::optional<net::Namespaces> nodes;
  if (settings.namespaces) {
    if (const std::string why = net::why_no_namespaces(); !why.empty()) {
      fmt::print("skipped: {}\n0 passed, 0 failed, 1 skipped\n", why);
      return 77;
    }
    nodes.emplace(Limits{}.max_ranks);
    target.enter_node = [&](int node) { net::live_on(*nodes, node); };
    suite.sent_bytes = [&] {
      std::int64_t bytes = 0;
      for (int node = 0; node < nodes->nodes(); ++node) bytes += nodes->traffic(node).sent;
      return bytes;
    };
  }
  if (settings.full) suite.every = 1;
  pass_on(settings, "--combine", "DEEP_EP_COMBINE", settings.combine);
  pass_on(settings, "--inbox-bytes", "DEEP_EP_INBOX_BYTES", settings.inbox_bytes);
  fmt::print("contract suite: {} {}, {} programs, seed {}{}\n", settings.backend, settings.mode,
             programs.size(), settings.seed, settings.full ? ", full" : "");
  return run_suite(programs, target, suite);
}

}  // namespace
}  // namespace deep_ep::test

int main(int argc, char** argv) {
  CLI::App app{"Runs a backend and mode against the reference on a pool of rank processes."};
  deep_ep::test::Settings settings;
  const char* wants_full = std::getenv("DEEP_EP_TEST_FULL");
  settings.full = wants_full != nullptr && std::string(wants_full) == "1";
  deep_ep::test::add_options(app, settings);
  CLI11_PARSE(app, argc, argv);
  return deep_ep::test::run(settings, argv[0]);
}
