#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <optional>
#include <random>
#include <sstream>
#include <thread>

#include "contract/pool.hpp"
#include "deep_ep/deep_ep.hpp"
#include "handle_play.hpp"
#include "verify/case.hpp"
#include "verify/low_latency_case.hpp"
#include "wrong_calls.hpp"

// A rank on a GPU dies, sleeps, or calls with something else than the others: all others get an
// Error that names it, their CUDA contexts live on, and a new Buffer works. Prints "N passed, N
// failed, N skipped".
namespace deep_ep::test {
namespace {

using std::chrono_literals::operator""s;
using std::chrono_literals::operator""ms;
using Clock = std::chrono::steady_clock;

constexpr int kVictim = 1;
constexpr auto kJobLimit = 60s;
constexpr auto kTimeout = 3000ms;
constexpr const char* kSkip = "skip: ";
constexpr int kNodes = 2;
/// Unless said otherwise. The victim, a rank of its node and its rail peer are three that learn of
/// it in three ways.
constexpr int kRanksPerNode = 2;

/// kByHandle: over several nodes, with handles.
enum class Mode { kIntranode, kInternode, kByHandle, kLowLatency, kInternodeLowLatency };

/// Within the timeout, so that nothing is wrong.
constexpr const char* kLate = "late";

struct Scenario {
  const char* name;
  ErrorCode code;
  const char* word;  ///< that the Errors of the others contain
  Mode mode = Mode::kIntranode;

  bool over_nodes() const { return mode != Mode::kIntranode && mode != Mode::kLowLatency; }
  bool low_latency() const {
    return mode == Mode::kLowLatency || mode == Mode::kInternodeLowLatency;
  }
  int ranks(int ranks_per_node) const { return over_nodes() ? kNodes * ranks_per_node : 3; }
  std::string full_name() const {
    constexpr const char* kModes[] = {
        "", "internode: ", "internode by handle: ", "low latency: ", "internode low latency: "};
    return std::string(kModes[static_cast<int>(mode)]) + name;
  }
};

constexpr Scenario kScenarios[] = {
    {"killed", ErrorCode::kPeerFailed, "rank 1"},
    {"left", ErrorCode::kPeerFailed, "rank 1"},
    {"asleep", ErrorCode::kTimeout, "rank 1"},
    {"hidden", ErrorCode::kDisagreement, "hidden"},
    {"combine_dtype", ErrorCode::kDisagreement, "dtype of x"},
    {"barrier", ErrorCode::kDisagreement, "operation"},
    {"capacity", ErrorCode::kCapacity, "num_worst_tokens"},
    {"expert_id", ErrorCode::kPeerFailed, "topk_idx"},
    {"refused", ErrorCode::kPeerFailed, "expert_alignment"},
    {"killed", ErrorCode::kPeerFailed, "rank 1", Mode::kInternode},
    {"left", ErrorCode::kPeerFailed, "rank 1", Mode::kInternode},
    {"asleep", ErrorCode::kTimeout, "rank 1", Mode::kInternode},
    {"hidden", ErrorCode::kDisagreement, "hidden", Mode::kInternode},
    {"combine_dtype", ErrorCode::kDisagreement, "dtype of x", Mode::kInternode},
    {"barrier", ErrorCode::kDisagreement, "operation", Mode::kInternode},
    {"capacity", ErrorCode::kCapacity, "num_worst_tokens", Mode::kInternode},
    {"expert_id", ErrorCode::kPeerFailed, "topk_idx", Mode::kInternode},
    {"refused", ErrorCode::kPeerFailed, "expert_alignment", Mode::kInternode},
    {"killed", ErrorCode::kPeerFailed, "rank 1", Mode::kByHandle},
    {"left", ErrorCode::kPeerFailed, "rank 1", Mode::kByHandle},
    {"asleep", ErrorCode::kTimeout, "rank 1", Mode::kByHandle},
    {"asleep_in_combine", ErrorCode::kTimeout, "rank 1", Mode::kByHandle},
    {"hidden", ErrorCode::kDisagreement, "hidden", Mode::kByHandle},
    {"other_handle", ErrorCode::kDisagreement, "handle", Mode::kByHandle},
    // No Error at all.
    {kLate, ErrorCode::kUsage, "", Mode::kByHandle},
    {"killed", ErrorCode::kPeerFailed, "rank 1", Mode::kLowLatency},
    {"left", ErrorCode::kPeerFailed, "rank 1", Mode::kLowLatency},
    {"asleep", ErrorCode::kTimeout, "rank 1", Mode::kLowLatency},
    {"hidden", ErrorCode::kDisagreement, "hidden", Mode::kLowLatency},
    {"expert_id", ErrorCode::kPeerFailed, "topk_idx", Mode::kLowLatency},
    {"killed", ErrorCode::kPeerFailed, "rank 1", Mode::kInternodeLowLatency},
    {"left", ErrorCode::kPeerFailed, "rank 1", Mode::kInternodeLowLatency},
    {"asleep", ErrorCode::kTimeout, "rank 1", Mode::kInternodeLowLatency},
    {"hidden", ErrorCode::kDisagreement, "hidden", Mode::kInternodeLowLatency},
    {"expert_id", ErrorCode::kPeerFailed, "topk_idx", Mode::kInternodeLowLatency},
};

verify::Case exchange_of(const Buffer& buffer) {
  verify::Case exchange;
  const int ranks = buffer.num_ranks();
  exchange.ranks = ranks;
  if (buffer.num_nodes() > 1) exchange.ranks_per_node = buffer.num_ranks_per_node();
  exchange.experts = 4 * ranks;
  exchange.topk = 3;
  exchange.tokens = {200};
  exchange.hidden = 512;
  exchange.combine_dtype = DType::kBfloat16;
  exchange.cached_repeats = 2;
  return exchange;
}

verify::LowLatencyCase low_latency_of(int ranks, int ranks_per_node = 0) {
  verify::LowLatencyCase exchange;
  exchange.ranks_per_node = ranks_per_node;
  exchange.ranks = ranks;
  exchange.experts = 4 * ranks;
  exchange.topk = 3;
  exchange.tokens = {50};
  exchange.max_tokens = 64;
  exchange.hidden = 1024;
  return exchange;
}

verify::LowLatencyCase low_latency_of(const Buffer& buffer) {
  return low_latency_of(buffer.num_ranks(),
                        buffer.num_nodes() > 1 ? buffer.num_ranks_per_node() : 0);
}

[[noreturn]] void be_killed(const std::function<void()>& call) {
  std::thread([] {
    usleep(std::random_device{}() % 200'000);
    kill(getpid(), SIGKILL);
  }).detach();
  for (;;) call();
}

/// What a rank does while nothing is wrong.
verify::CaseResult run_exchange(Buffer& buffer, const Scenario& scenario) {
  return scenario.low_latency() ? verify::run_case(buffer, low_latency_of(buffer))
                                : verify::run_case(buffer, exchange_of(buffer));
}

/// What the victim does; throws as the others do if it learns of it.
void act(Buffer& buffer, const Scenario& what) {
  const std::string scenario = what.name;
  verify::Case exchange = exchange_of(buffer);
  if (scenario == "killed") be_killed([&] { (void)run_exchange(buffer, what); });
  if (scenario == "left") return buffer.destroy();
  if (scenario == "asleep") std::this_thread::sleep_for(kTimeout * 2);
  if (scenario == "barrier") return buffer.barrier();
  if (what.low_latency()) {
    verify::LowLatencyCase other = low_latency_of(buffer);
    if (scenario == "hidden") other.hidden = 2048;
    (void)verify::run_case(buffer, other);
    return;
  }
  if (scenario == "hidden") exchange.hidden = 1024;
  if (scenario == "combine_dtype") exchange.combine_dtype = DType::kFloat16;
  (void)verify::run_case(buffer, exchange);
}

/// Without one of those that have joined it NVSHMEM serves no Buffer over several nodes.
std::string refuse_others(Worker& worker, const std::vector<int>& others, BufferOptions options) {
  setenv("DEEP_EP_RANKS_PER_NODE", "1", 1);
  try {
    const Buffer fresh(worker.bootstrap_among(others), options);
    return "a Buffer of other ranks works; ";
  } catch (const Error& error) {
    const bool right = error.code() == ErrorCode::kUnsupported &&
                       std::string(error.what()).find("NVSHMEM") != std::string::npos;
    return right ? "" : fmt::format("a Buffer of other ranks: {}; ", error.what());
  }
}

/// What is wrong with the Error of a rank that is not the victim.
std::string check_error(const Error& error, const Scenario& scenario, int ranks_per_node) {
  const std::string text = error.what();
  std::string wrong;
  // Who has its node for itself dies without anybody's telling.
  const bool untold =
      scenario.over_nodes() && ranks_per_node == 1 && std::string(scenario.name) == "killed";
  if (error.code() != (untold ? ErrorCode::kTimeout : scenario.code))
    wrong += fmt::format("code {}: {}; ", to_string(error.code()), text);
  if (text.find(scenario.word) == std::string::npos)
    wrong += fmt::format("'{}' is missing in '{}'; ", scenario.word, text);
  // Of two ranks that disagree each may be the one that finds it, and blames the other.
  const bool sure =
      error.code() != ErrorCode::kDisagreement && std::string(scenario.name) != "capacity";
  if (error.ranks().empty() || (sure && error.ranks() != std::vector{kVictim}))
    wrong += fmt::format("ranks() is not the victim: {}; ", text);
  return wrong;
}

/// The same for calls by handle; the victim's part, or that of all others. What is wrong with the
/// results, or "".
std::string act_by_handle(Buffer& buffer, HandlePlay& calls, const std::string& scenario) {
  const bool victim = buffer.rank() == kVictim;
  const auto begin = Clock::now();
  const auto round = [&](std::chrono::milliseconds before, std::chrono::milliseconds between) {
    std::this_thread::sleep_for(before);
    calls.dispatch();
    std::this_thread::sleep_for(between);
    calls.combine();
  };
  if (scenario == kLate) {
    round(victim ? kTimeout / 3 : 0ms, victim ? kTimeout / 3 : 0ms);
    return calls.check();
  }
  std::string wrong;
  while (!victim && wrong.empty() && Clock::now() - begin < 20s) {
    round(0ms, 0ms);
    wrong = calls.check();
  }
  if (!victim) return wrong;
  if (scenario == "killed") be_killed([&] { round(0ms, 0ms); });
  if (scenario == "left") buffer.destroy();
  if (scenario == "asleep") round(kTimeout * 2, 0ms);
  if (scenario == "asleep_in_combine") round(0ms, kTimeout * 2);
  if (scenario == "hidden") calls.dispatch_other_hidden();
  if (scenario == "other_handle") calls.dispatch_other_handle();
  return "";
}

/// All of a rank's calls around the fault, each rank's own part of it.
std::string act_all(Buffer& buffer, HandlePlay* calls, const Scenario& scenario) {
  const std::string name = scenario.name;
  const auto begin = Clock::now();
  if (calls != nullptr) return act_by_handle(buffer, *calls, name);
  if (scenario.low_latency() && name == "expert_id") {
    low_latency_dispatch_wrongly(buffer, buffer.rank() == kVictim);
  } else if (name == "capacity" || name == "expert_id" || name == "refused") {
    dispatch_wrongly(buffer, name, buffer.rank() == kVictim);
  } else if (buffer.rank() == kVictim) {
    act(buffer, scenario);
  } else {
    while (Clock::now() - begin < 20s) (void)run_exchange(buffer, scenario);
  }
  return "";
}

std::string play_fault(Worker& worker, Buffer& buffer, const Scenario& scenario,
                       int ranks_per_node) {
  if (!run_exchange(buffer, scenario).passed()) return "wrong before the fault";
  std::optional<HandlePlay> calls;
  if (scenario.mode == Mode::kByHandle) calls.emplace(buffer);
  buffer.barrier();
  worker.bootstrap()->barrier();  // nobody is in that one any more when the victim acts
  const bool victim = buffer.rank() == kVictim;
  const bool late = std::string(scenario.name) == kLate;
  std::string wrong;
  try {
    wrong = act_all(buffer, calls ? &*calls : nullptr, scenario);
    if (!victim && !late) wrong += "no Error; ";
  } catch (const Error& error) {
    if (late) wrong += fmt::format("an Error: {}; ", error.what());
    if (!victim && !late) wrong += check_error(error, scenario, ranks_per_node);
    try {
      buffer.barrier();
      wrong += "a call after the fault succeeds; ";
    } catch (const Error&) {
    }
  }
  const auto before = Clock::now();
  buffer.destroy();
  if (Clock::now() - before > kTimeout * 2) wrong += "destroy waits; ";
  return wrong;
}

std::string play(Worker& worker, const std::string& job) {
  std::istringstream numbers(job);
  int number = 0, ranks_per_node = 0;
  numbers >> number >> ranks_per_node;
  const Scenario& scenario = kScenarios[number];
  const int gpus = num_devices(DeviceType::kCuda);
  if (gpus == 0) return std::string(kSkip) + "no GPU";
  BufferOptions options;
  options.device = {DeviceType::kCuda, worker.rank() % gpus};
  options.timeout = kTimeout;
  options.num_rdma_bytes = 2 * low_latency_of(scenario.ranks(ranks_per_node)).buffer_bytes();
  options.low_latency_mode = scenario.low_latency();
  // The processes of a scenario over nodes are its own.
  if (scenario.over_nodes())
    setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(ranks_per_node).c_str(), 1);
  try {
    (void)Buffer(worker.bootstrap(), options);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kUnsupported) return kSkip + std::string(error.what());
    throw;
  }
  std::string wrong;
  {
    Buffer buffer(worker.bootstrap(), options);
    wrong = play_fault(worker, buffer, scenario, ranks_per_node);
  }
  const bool killed = std::string(scenario.name) == "killed";
  std::vector<int> others;
  for (int rank = 0; rank < scenario.ranks(ranks_per_node); ++rank) {
    if (rank != kVictim || !killed) others.push_back(rank);
  }
  // One rank needs no NVSHMEM.
  if (scenario.over_nodes() && killed && others.size() > 1)
    return wrong + refuse_others(worker, others, options);
  Buffer fresh(worker.bootstrap_among(others), options);
  const auto result = run_exchange(fresh, scenario);
  if (!result.passed()) wrong += "a new Buffer is wrong: " + result.first_mismatch;
  return wrong;
}

/// What is wrong, "", or why it was skipped.
std::string run_scenario(Pool& pool, int number, int ranks_per_node) {
  const Scenario& scenario = kScenarios[number];
  const int ranks = scenario.ranks(ranks_per_node);
  std::string wrong;
  const auto outcomes = pool.run(ranks, fmt::format("{} {}", number, ranks_per_node), kJobLimit);
  for (int rank = 0; rank < ranks; ++rank) {
    const Outcome& outcome = outcomes[static_cast<std::size_t>(rank)];
    if (outcome.answer.starts_with(kSkip)) return outcome.answer;
    const bool expected_death =
        rank == kVictim && outcome.signal == SIGKILL && std::string(scenario.name) == "killed";
    if (expected_death || (outcome.answered && outcome.answer.empty())) continue;
    wrong += fmt::format("\n  rank {}: {}", rank,
                         outcome.timed_out ? "hangs" : outcome.answer + outcome.failure);
  }
  return wrong;
}

int run(int rounds, const std::string& filter, int ranks_per_node) {
  Pool shared(3, play);
  int passed = 0;
  int failed = 0;
  int skipped = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < static_cast<int>(std::size(kScenarios)); ++i) {
      const std::string name = kScenarios[i].full_name();
      if (name.find(filter) == std::string::npos) continue;
      std::string wrong;
      if (kScenarios[i].over_nodes()) {
        Pool own(kScenarios[i].ranks(ranks_per_node), play);
        wrong = run_scenario(own, i, ranks_per_node);
      } else {
        wrong = run_scenario(shared, i, ranks_per_node);
      }
      const bool skip = wrong.starts_with(kSkip);
      if (!skip && !wrong.empty()) fmt::print("FAILED {}{}\n", name, wrong);
      ++(skip ? skipped : wrong.empty() ? passed : failed);
      std::fflush(stdout);
    }
  }
  fmt::print("{} passed, {} failed, {} skipped\n", passed, failed, skipped);
  return failed != 0 ? 1 : passed == 0 ? 77 : 0;
}

}  // namespace
}  // namespace deep_ep::test

/// Arguments: rounds, what the names of scenarios contain, and ranks of each of the two nodes. With
/// DEEP_EP_NVSHMEM_PUTS_ONLY=1 they put also where memory is mapped.
int main(int argc, char** argv) {
  return deep_ep::test::run(argc > 1 ? std::stoi(argv[1]) : 1, argc > 2 ? argv[2] : "",
                            argc > 3 ? std::stoi(argv[3]) : deep_ep::test::kRanksPerNode);
}
