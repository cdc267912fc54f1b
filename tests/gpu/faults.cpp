#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <thread>

#include "contract/pool.hpp"
#include "deep_ep/deep_ep.hpp"
#include "verify/case.hpp"
#include "verify/low_latency_case.hpp"
#include "verify/transfer.hpp"

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

enum class Mode { kIntranode, kInternode, kLowLatency, kInternodeLowLatency };

struct Scenario {
  const char* name;
  ErrorCode code;
  const char* word;  ///< that the Errors of the others contain
  Mode mode = Mode::kIntranode;

  bool over_nodes() const { return mode == Mode::kInternode || mode == Mode::kInternodeLowLatency; }
  bool low_latency() const {
    return mode == Mode::kLowLatency || mode == Mode::kInternodeLowLatency;
  }
  int ranks() const { return over_nodes() ? 4 : 3; }
  const char* mode_name() const {
    constexpr const char* kNames[] = {"",
                                      "internode: ", "low latency: ", "internode low latency: "};
    return kNames[static_cast<int>(mode)];
  }
};
/// The victim, a rank of its node and its rail peer are three that learn of it in three ways.
constexpr int kRanksPerNode = 2;

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

/// What a rank does while nothing is wrong.
verify::CaseResult run_exchange(Buffer& buffer, const Scenario& scenario) {
  return scenario.low_latency() ? verify::run_case(buffer, low_latency_of(buffer))
                                : verify::run_case(buffer, exchange_of(buffer));
}

/// A low-latency dispatch with an expert that does not exist.
void low_latency_dispatch_wrongly(Buffer& buffer) {
  constexpr std::int64_t kTokens = 20;
  std::vector<std::int64_t> ids(kTokens, 0);
  if (buffer.rank() == kVictim) ids[7] = buffer.num_ranks();
  const std::vector<std::uint16_t> x(kTokens * 64, 0x3f80);
  const Tensor rows =
      verify::on_device(TensorView(x.data(), DType::kBfloat16, {kTokens, 64}), buffer.device());
  const Tensor topk_idx =
      verify::on_device(TensorView(ids.data(), DType::kInt64, {kTokens, 1}), buffer.device());
  LowLatencyDispatchArgs args;
  args.options.stream = verify::own_stream();
  args.x = rows;
  args.topk_idx = topk_idx;
  args.use_fp8 = false;
  args.num_max_dispatch_tokens_per_rank = kTokens;
  args.num_experts = buffer.num_ranks();
  buffer.low_latency_dispatch(args).event.host_wait();
}

/// A dispatch with one argument that is wrong.
void dispatch_wrongly(Buffer& buffer, const std::string& scenario) {
  constexpr std::int64_t kTokens = 40;
  const int ranks = buffer.num_ranks();
  std::vector<std::int64_t> ids(kTokens * ranks);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int64_t>(i) % ranks;
  const std::vector<float> x(kTokens * 64, 1.5F);
  const auto on_gpu = [&](const void* data, DType dtype, std::int64_t columns) {
    return verify::on_device(TensorView(data, dtype, {kTokens, columns}), buffer.device());
  };
  DispatchArgs args;
  args.options.stream = verify::own_stream();
  const Tensor rows = on_gpu(x.data(), DType::kFloat32, 64);
  Tensor topk_idx = on_gpu(ids.data(), DType::kInt64, ranks);
  args.layout = buffer.get_dispatch_layout(topk_idx, ranks, args.options);
  if (buffer.rank() == kVictim && scenario == "expert_id") {
    ids[7] = ranks;
    topk_idx = on_gpu(ids.data(), DType::kInt64, ranks);
  }
  args.x = rows;
  args.topk_idx = topk_idx;
  if (buffer.rank() == kVictim && scenario == "refused") args.expert_alignment = 0;
  if (scenario == "capacity") args.num_worst_tokens = buffer.rank() == kVictim ? 5 : 400;
  buffer.dispatch(args).event.host_wait();
}

/// What the victim does; throws as the others do if it learns of it.
void act(Buffer& buffer, const Scenario& what) {
  const std::string scenario = what.name;
  verify::Case exchange = exchange_of(buffer);
  if (scenario == "killed") {
    std::thread([] {
      usleep(std::random_device{}() % 200'000);
      kill(getpid(), SIGKILL);
    }).detach();
    for (;;) (void)run_exchange(buffer, what);
  }
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
std::string check_error(const Error& error, const Scenario& scenario) {
  const std::string text = error.what();
  std::string wrong;
  if (error.code() != scenario.code)
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

std::string play(Worker& worker, const std::string& job) {
  const Scenario& scenario = kScenarios[std::stoi(job)];
  const std::string name = scenario.name;
  const int gpus = num_devices(DeviceType::kCuda);
  if (gpus == 0) return std::string(kSkip) + "no GPU";
  BufferOptions options;
  options.device = {DeviceType::kCuda, worker.rank() % gpus};
  options.timeout = kTimeout;
  options.num_rdma_bytes = 2 * low_latency_of(scenario.ranks()).buffer_bytes();
  const bool internode = scenario.over_nodes();
  options.low_latency_mode = scenario.low_latency();
  // The processes of a scenario are its own.
  if (internode) setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(kRanksPerNode).c_str(), 1);
  const bool victim = worker.rank() == kVictim;
  std::string wrong;
  try {
    (void)Buffer(worker.bootstrap(), options);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kUnsupported) return kSkip + std::string(error.what());
    throw;
  }
  {
    Buffer buffer(worker.bootstrap(), options);
    if (!run_exchange(buffer, scenario).passed()) return "wrong before the fault";
    buffer.barrier();
    const auto begin = Clock::now();
    try {
      if (scenario.low_latency() && name == "expert_id") {
        low_latency_dispatch_wrongly(buffer);
      } else if (name == "capacity" || name == "expert_id" || name == "refused") {
        dispatch_wrongly(buffer, name);
      } else if (victim) {
        act(buffer, scenario);
      } else {
        while (Clock::now() - begin < 20s) (void)run_exchange(buffer, scenario);
      }
      if (!victim) wrong += "no Error; ";
    } catch (const Error& error) {
      if (!victim) wrong += check_error(error, scenario);
      try {
        buffer.barrier();
        wrong += "a call after the fault succeeds; ";
      } catch (const Error&) {
      }
    }
    const auto before = Clock::now();
    buffer.destroy();
    if (Clock::now() - before > kTimeout * 2) wrong += "destroy waits; ";
  }
  std::vector<int> others;
  for (int rank = 0; rank < scenario.ranks(); ++rank) {
    if (rank != kVictim || name != "killed") others.push_back(rank);
  }
  if (internode && name == "killed") return wrong + refuse_others(worker, others, options);
  Buffer fresh(worker.bootstrap_among(others), options);
  const auto result = run_exchange(fresh, scenario);
  if (!result.passed()) wrong += "a new Buffer is wrong: " + result.first_mismatch;
  return wrong;
}

/// What is wrong, "", or why it was skipped.
std::string run_scenario(Pool& pool, int number) {
  const Scenario& scenario = kScenarios[number];
  std::string wrong;
  const auto outcomes = pool.run(scenario.ranks(), std::to_string(number), kJobLimit);
  for (int rank = 0; rank < scenario.ranks(); ++rank) {
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

int run(int rounds, const std::string& filter) {
  Pool shared(3, play);
  int passed = 0;
  int failed = 0;
  int skipped = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < static_cast<int>(std::size(kScenarios)); ++i) {
      const std::string name = std::string(kScenarios[i].mode_name()) + kScenarios[i].name;
      if (name.find(filter) == std::string::npos) continue;
      std::string wrong;
      if (kScenarios[i].over_nodes()) {
        Pool own(kScenarios[i].ranks(), play);
        wrong = run_scenario(own, i);
      } else {
        wrong = run_scenario(shared, i);
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

/// Arguments: rounds, and what the names of scenarios contain.
int main(int argc, char** argv) {
  return deep_ep::test::run(argc > 1 ? std::stoi(argv[1]) : 1, argc > 2 ? argv[2] : "");
}
