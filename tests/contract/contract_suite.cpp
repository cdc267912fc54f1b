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

}  // namespace
}  // namespace deep_ep::test

int main(int argc, char** argv) {
  using namespace deep_ep;
  CLI::App app{"Runs a backend and mode against the reference on a pool of rank processes."};
  std::string backend = "host";
  std::string mode = "intranode";
  std::uint64_t seed = 1;
  std::int64_t timeout_ms = 20'000;
  const char* wants_full = std::getenv("DEEP_EP_TEST_FULL");
  bool full = wants_full != nullptr && std::string(wants_full) == "1";
  bool list = false;
  bool namespaces = false;
  test::SuiteOptions options;
  app.add_option("--backend", backend)
      ->check(CLI::IsMember({"host", "cuda"}))
      ->capture_default_str();
  app.add_option("--mode", mode)
      ->check(CLI::IsMember({"intranode", "internode", "low-latency", "internode-low-latency"}))
      ->capture_default_str();
  app.add_option("--seed", seed, "of the covering array and the inputs")->capture_default_str();
  app.add_option("--from", options.from, "first program")->capture_default_str();
  app.add_option("--count", options.count, "number of programs, -1: all")->capture_default_str();
  app.add_option("--every", options.every, "only one program in so many")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--filter", options.filter, "only programs whose name contains this");
  std::string combine;
  std::string inbox_bytes;
  app.add_option("--combine", combine, "how combine fetches rows: auto, pull or ring");
  app.add_option("--inbox-bytes", inbox_bytes, "DEEP_EP_INBOX_BYTES of the ranks");
  app.add_option("--timeout-ms", timeout_ms, "of each wait")->capture_default_str();
  app.add_option("--seconds", options.max_seconds, "stop after so long; 0: no limit");
  app.add_flag("--full", full, "more programs, with up to 1 GiB each (or DEEP_EP_TEST_FULL=1)");
  app.add_flag("--namespaces", namespaces,
               "nodes are network namespaces, as root; else ranks of this machine pose as nodes");
  app.add_flag("--list", list, "print the programs and run none");
  CLI11_PARSE(app, argc, argv);

  const test::ProgramList programs(mode, seed, full);
  if (list) {
    for (std::int64_t i = 0; i < programs.size(); ++i)
      fmt::print("{} {}\n", i, programs.at(i).describe());
    return 0;
  }
  test::Target target;
  target.device.type = backend == "cuda" ? DeviceType::kCuda : DeviceType::kHost;
  target.timeout = std::chrono::milliseconds(timeout_ms);
  options.one_world = backend == "cuda" && mode == "internode";
  options.replay = fmt::format("{} --backend {} --mode {} --seed {}{}", argv[0], backend, mode,
                               seed, full ? " --full" : "");
  std::optional<net::Namespaces> nodes;
  if (namespaces) {
    if (const std::string why = net::why_no_namespaces(); !why.empty()) {
      fmt::print("skipped: {}\n0 passed, 0 failed, 1 skipped\n", why);
      return 77;
    }
    nodes.emplace(test::Limits{}.max_ranks);
    target.enter_node = [&](int node) { net::live_on(*nodes, node); };
    options.replay += " --namespaces";
    if (full) options.every = 1;
  }
  // The ranks are forked later.
  const auto pass_on = [&](const char* flag, const char* variable, const std::string& value) {
    if (value.empty()) return;
    setenv(variable, value.c_str(), 1);
    options.replay += fmt::format(" {} {}", flag, value);
  };
  pass_on("--combine", "DEEP_EP_COMBINE", combine);
  pass_on("--inbox-bytes", "DEEP_EP_INBOX_BYTES", inbox_bytes);
  fmt::print("contract suite: {} {}, {} programs, seed {}{}\n", backend, mode, programs.size(),
             seed, full ? ", full" : "");
  return test::run_suite(programs, target, options);
}
