#include <fmt/format.h>
#include <mpi.h>

#include <cstdio>
#include <functional>
#include <memory>

#include <nlohmann/json.hpp>

#include "deep_ep/buffer.hpp"
#include "mpi/mpi_low_latency.hpp"
#include "mpi/worker.hpp"
#include "mpi/world.hpp"
#include "stats.hpp"
#include "verify/low_latency_checks.hpp"
#include "verify/low_latency_inputs.hpp"

namespace deep_ep::bench {
namespace {

verify::LowLatencyCase make_case(const Settings& settings, int ranks, std::int64_t tokens) {
  verify::LowLatencyCase c;
  c.ranks = ranks;
  c.tokens = {tokens};
  c.hidden = settings.hidden;
  c.topk = settings.topk;
  c.experts = settings.experts;
  c.seed = settings.seed;
  verify::validate(c);
  return c;
}

/// One shape's inputs, and both ways to bring them there and back.
class Contest {
 public:
  Contest(Buffer& buffer, const verify::LowLatencyCase& c)
      : buffer_(buffer), c_(c), mpi_(c, buffer.rank()) {
    load(0);
  }

  /// New rows and another routing: what an earlier call left behind would be wrong.
  void load(int round) {
    expected_ = std::make_unique<verify::LowLatencyExpected>(c_, round);
    const verify::LowLatencyInputs inputs(c_, *expected_, buffer_.rank());
    x_ = inputs.x();
    ids_ = inputs.topk_idx();
    weights_ = inputs.topk_weights();
    y_ = inputs.expert_rows(round);
  }
  int round() const { return expected_->round; }

  void dispatch() {
    LowLatencyDispatchArgs args;
    args.x = x_;
    args.topk_idx = ids_;
    args.num_max_dispatch_tokens_per_rank = static_cast<int>(c_.capacity());
    args.num_experts = c_.experts;
    received_ = {};
    received_ = buffer_.low_latency_dispatch(args);
  }
  void combine() {
    LowLatencyCombineArgs args;
    args.x = y_;
    args.topk_idx = ids_;
    args.topk_weights = weights_;
    args.handle = received_.handle;
    combined_ = {};
    combined_ = buffer_.low_latency_combine(args).combined_x;
  }
  void mpi_dispatch() { mpi_.dispatch(x_.as<const std::byte>(), ids_.as<const std::int64_t>()); }
  void mpi_combine() {
    mpi_.combine(y_.as<const std::byte>(), ids_.as<const std::int64_t>(),
                 weights_.as<const float>());
  }

  std::int64_t count_wrong() const {
    verify::LowLatencyChecks checks(c_, buffer_.rank());
    checks.stage("ours");
    checks.dispatched(received_, *expected_);
    checks.combined(combined_, *expected_, round());
    checks.stage("MPI's");
    checks.dispatched(mpi_.received(), *expected_);
    checks.combined(mpi_.combined(), *expected_, round());
    if (!checks.result().passed())
      fmt::print(stderr, "rank {}: {}\n", buffer_.rank(), checks.result().first_mismatch);
    return checks.result().wrong_elements;
  }

 private:
  Buffer& buffer_;
  const verify::LowLatencyCase c_;
  MpiLowLatency mpi_;
  std::unique_ptr<verify::LowLatencyExpected> expected_;
  Tensor x_, ids_, weights_, y_;
  LowLatencyDispatchResult received_;
  Tensor combined_;
};

/// us a call, of the slowest rank; both ways in turn, so that a slow spell of the machine hits both
/// alike. The last round is on new rows, which are then checked.
nlohmann::ordered_json measure(Contest& contest, const Settings& settings, int chain,
                               long long& wrong) {
  struct Operation {
    const char* name;
    std::function<void()> call;
    std::vector<double> times_us{};
  };
  std::vector<Operation> operations = {{"dispatch", [&] { contest.dispatch(); }},
                                       {"combine", [&] { contest.combine(); }},
                                       {"pair",
                                        [&] {
                                          contest.dispatch();
                                          contest.combine();
                                        }},
                                       {"mpi_dispatch", [&] { contest.mpi_dispatch(); }},
                                       {"mpi_combine", [&] { contest.mpi_combine(); }},
                                       {"mpi_pair", [&] {
                                          contest.mpi_dispatch();
                                          contest.mpi_combine();
                                        }}};
  for (int i = -1; i < settings.repeats; ++i) {
    if (i + 1 == settings.repeats) {
      contest.load(contest.round() + 1);
      contest.dispatch();  // whose results combine takes
      contest.mpi_dispatch();
    }
    for (Operation& operation : operations) {
      const double time = run_timed([&] {
        for (int n = 0; n < chain; ++n) operation.call();
      });
      if (i >= 0) operation.times_us.push_back(time / chain);
    }
  }
  wrong += contest.count_wrong();
  nlohmann::ordered_json json;
  for (const Operation& operation : operations) {
    const auto times = cli::summarize(slowest_rank(operation.times_us));
    json[operation.name] = {
        {"median", times.median}, {"p99", times.p99}, {"min", times.min}, {"max", times.max}};
  }
  return json;
}

}  // namespace

int run_low_latency_worker(const Settings& settings) {
  constexpr int kSmallChain = 100;
  const Mpi mpi;
  const verify::LowLatencyCase large = make_case(settings, mpi.size, settings.tokens);
  const verify::LowLatencyCase small = make_case(settings, mpi.size, 1);
  BufferOptions options;
  options.num_rdma_bytes = large.buffer_bytes();
  Buffer buffer(
      bootstrap_callback(mpi.rank, mpi.size,
                         [&](std::string_view bytes) { return all_gather(mpi.size, bytes); }),
      options);
  long long wrong = 0;
  nlohmann::ordered_json json;
  {
    Contest contest(buffer, large);
    json["times_us"] = measure(contest, settings, 1, wrong);
  }
  Contest contest(buffer, small);
  json["t1_times_us"] = measure(contest, settings, kSmallChain, wrong);
  MPI_Allreduce(MPI_IN_PLACE, &wrong, 1, MPI_LONG_LONG, MPI_SUM, MPI_COMM_WORLD);
  for (const char* times : {"times_us", "t1_times_us"})
    json[std::string(times) + "_pair_vs_mpi"] = json[times]["mpi_pair"]["median"].get<double>() /
                                                json[times]["pair"]["median"].get<double>();
  json["wrong_elements"] = wrong;
  json["our_transport"] = buffer.transport();
  if (mpi.rank == 0) print_result(json);
  return wrong == 0 ? 0 : 1;
}

}  // namespace deep_ep::bench
