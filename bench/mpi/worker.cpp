#include "mpi/worker.hpp"

#include <fmt/format.h>
#include <mpi.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <optional>

#include <nlohmann/json.hpp>

#include "deep_ep/buffer.hpp"
#include "mpi/mpi_exchange.hpp"
#include "mpi/world.hpp"
#include "stats.hpp"
#include "verify/checks.hpp"

namespace deep_ep::bench {
namespace {

using OwnRows = MpiExchange::OwnRows;

verify::Case make_case(const Settings& settings, int ranks) {
  verify::Case c;
  c.ranks = ranks;
  c.tokens = {settings.tokens};
  c.hidden = settings.hidden;
  c.topk = settings.topk;
  c.experts = settings.experts;
  c.seed = settings.seed;
  c.weights = false;
  verify::validate(c);
  return c;
}

/// One shape's inputs in ordinary memory, and the rows that must come of them.
struct Problem {
  Problem(const Settings& settings, const Mpi& mpi)
      : c(make_case(settings, mpi.size)),
        expected(verify::make_expected(c, verify::make_routings(c), mpi.rank)),
        inputs(c, expected),
        row_bytes(settings.hidden * 2),
        received_bytes(expected.received.num_rows * row_bytes),
        output_bytes(settings.tokens * row_bytes),
        x_memory(output_bytes),
        y_memory(received_bytes),
        x(x_memory.data(), DType::kBfloat16, {settings.tokens, settings.hidden}),
        y(y_memory.data(), DType::kBfloat16, {expected.received.num_rows, settings.hidden}) {
    load(0);
  }

  /// New rows: what an earlier call left behind would be wrong.
  void load(int new_round) {
    round = new_round;
    const Tensor new_x = inputs.x(round), new_y = inputs.combine_x(round);
    std::memcpy(x.data, new_x.data, new_x.nbytes());
    std::memcpy(y.data, new_y.data, new_y.nbytes());
    if (y_in_place.data != nullptr) std::memcpy(y_in_place.data, y.data, y.nbytes());
  }

  std::int64_t wrong_in(const DispatchResult& got) const {
    verify::Checks checks(c, expected, inputs);
    checks.payload(got, round);
    return report(checks);
  }
  std::int64_t wrong_in(const CombineResult& got) const {
    verify::Checks checks(c, expected, inputs);
    checks.combined(got, round);
    return report(checks);
  }
  std::int64_t report(const verify::Checks& checks) const {
    if (!checks.result().passed())
      fmt::print(stderr, "rank {}: {}\n", expected.rank, checks.result().first_mismatch);
    return checks.result().wrong_elements;
  }

  const verify::Case c;
  const verify::Expected expected;
  const verify::CaseInputs inputs;
  const std::int64_t row_bytes;
  const std::int64_t received_bytes;
  const std::int64_t output_bytes;
  HugeBuffer x_memory, y_memory;
  TensorView x, y;
  TensorView y_in_place{};  // the same where a dispatch left its rows, once it is said where
  int round = 0;
};

class Ours {
 public:
  Ours(Buffer& buffer, const Problem& problem) : buffer_(buffer), problem_(problem) {
    const Tensor ids = problem.inputs.topk_idx();
    DispatchArgs args;
    args.x = problem.x;
    args.layout = buffer.get_dispatch_layout(ids, problem.c.experts);
    args.topk_idx = ids;
    in_place_ = buffer.dispatch(args);
    handle_ = in_place_.handle;
  }
  /// Where experts that work in place leave their outputs.
  TensorView place_of_outputs() const { return in_place_.recv_x; }

  void dispatch() {
    received_ = {};
    DispatchArgs args;
    args.x = problem_.x;
    args.handle = handle_;
    received_ = buffer_.dispatch(args);
  }
  /// `y`: the experts' outputs, in memory of their own or where a dispatch left their inputs.
  void combine(const TensorView& y) {
    combined_ = {};
    CombineArgs args;
    args.x = y;
    args.handle = handle_;
    combined_ = buffer_.combine(args);
  }
  const DispatchResult& received() const { return received_; }
  const CombineResult& combined() const { return combined_; }

 private:
  Buffer& buffer_;
  const Problem& problem_;
  IntranodeHandle handle_{};
  DispatchResult in_place_{};  // its rows have become the experts' outputs
  DispatchResult received_{};
  CombineResult combined_{};
};

DispatchResult as_dispatch_result(const Problem& problem, const std::byte* rows) {
  DispatchResult result;
  result.recv_x =
      TensorView(rows, DType::kBfloat16, {problem.expected.received.num_rows, problem.c.hidden});
  return result;
}

CombineResult as_combine_result(const Problem& problem, const std::byte* rows) {
  CombineResult result;
  result.combined_x = TensorView(rows, DType::kBfloat16, {problem.c.tokens[0], problem.c.hidden});
  return result;
}

struct Operation {
  const char* name;
  std::function<void()> call;
  std::function<std::int64_t()> count_wrong;
  std::vector<double> times_us{};
};

std::vector<Operation> mpi_operations(const Problem& problem, MpiExchange& exchange) {
  std::vector<Operation> operations;
  const auto add = [&](const char* dispatch, const char* combine, OwnRows own) {
    operations.push_back(
        {dispatch, [&, own] { exchange.dispatch(problem.x.as<const std::byte>(), own); },
         [&] { return problem.wrong_in(as_dispatch_result(problem, exchange.received())); }});
    operations.push_back(
        {combine, [&, own] { exchange.combine(problem.y.as<const std::byte>(), own); },
         [&] { return problem.wrong_in(as_combine_result(problem, exchange.combined())); }});
  };
  add("mpi_dispatch", "mpi_combine", OwnRows::kThroughMpi);
  add("mpi_dispatch_own_direct", "mpi_combine_own_direct", OwnRows::kDirect);
  return operations;
}

// All operations in turn, so that a slow spell of the machine hits all alike; the last round on new
// rows, which are then checked.
std::int64_t measure(std::vector<Operation>& operations, Problem& problem, int repeats) {
  constexpr int kWarmup = 2;
  std::int64_t wrong = 0;
  for (int i = -kWarmup; i < repeats; ++i) {
    const bool last = i + 1 == repeats;
    if (last) problem.load(problem.round + 1);
    for (Operation& operation : operations) {
      const double time = run_timed(operation.call);
      if (i >= 0) operation.times_us.push_back(time);
      if (last) wrong += operation.count_wrong();
    }
  }
  for (Operation& operation : operations) operation.times_us = slowest_rank(operation.times_us);
  return wrong;
}

// Cached dispatch and combine of one token, one pair behind the other.
std::vector<double> measure_small_pairs(Buffer& buffer, const Settings& settings, const Mpi& mpi) {
  constexpr int kChain = 200;
  Settings small = settings;
  small.tokens = 1;
  const Problem problem(small, mpi);
  Ours ours(buffer, problem);
  std::vector<double> times;
  for (int i = -1; i < settings.repeats; ++i) {
    const double time = run_timed([&] {
      for (int n = 0; n < kChain; ++n) {
        ours.dispatch();
        ours.combine(problem.y);
      }
    });
    if (i >= 0) times.push_back(time / kChain);
  }
  return slowest_rank(times);
}

double median_of(const std::vector<Operation>& operations, std::string_view name) {
  for (const Operation& operation : operations)
    if (operation.name == name) return cli::summarize(operation.times_us).median;
  return 0;
}

double median_pair(const std::vector<Operation>& operations) {
  std::vector<double> sums = operations.at(0).times_us;
  for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += operations.at(1).times_us[i];
  return cli::summarize(sums).median;
}

nlohmann::ordered_json to_json(const std::vector<Operation>& operations, const Problem& problem) {
  nlohmann::ordered_json json;
  for (const Operation& operation : operations) {
    const auto times = cli::summarize(operation.times_us);
    json["times_us"][operation.name] = {
        {"median", times.median}, {"min", times.min}, {"max", times.max}};
  }
  const auto median = [&](std::string_view name) { return median_of(operations, name); };
  json["received_bytes"] = problem.received_bytes;
  json["output_bytes"] = problem.output_bytes;
  json["dispatch_vs_mpi"] = median("mpi_dispatch") / median("dispatch");
  json["combine_vs_mpi"] = median("mpi_combine") / median("combine");
  json["combine_in_place_vs_mpi"] = median("mpi_combine") / median("combine_in_place");
  json["dispatch_vs_mpi_own_direct"] = median("mpi_dispatch_own_direct") / median("dispatch");
  json["combine_vs_mpi_own_direct"] = median("mpi_combine_own_direct") / median("combine");
  json["memcpy_ratio"] = median_pair(operations) / median("memcpy");
  return json;
}

}  // namespace

int run_probe(const Settings& settings) {
  const Mpi mpi;
  const Problem problem(settings, mpi);
  MpiExchange exchange(problem.expected, problem.row_bytes);
  std::vector<double> times;
  for (int i = -1; i < 3; ++i) {
    const double time = run_timed([&] {
      exchange.dispatch(problem.x.as<const std::byte>(), OwnRows::kThroughMpi);
      exchange.combine(problem.y.as<const std::byte>(), OwnRows::kThroughMpi);
    });
    if (i >= 0) times.push_back(time);
  }
  const double median = cli::summarize(slowest_rank(times)).median;
  if (mpi.rank == 0) print_result({{"pair_us", median}});
  return 0;
}

int run_worker(const Settings& settings) {
  const Mpi mpi;
  Problem problem(settings, mpi);
  Buffer buffer(bootstrap_callback(
      mpi.rank, mpi.size, [&](std::string_view bytes) { return all_gather(mpi.size, bytes); }));
  Ours ours(buffer, problem);
  problem.y_in_place = ours.place_of_outputs();
  problem.load(problem.round);
  MpiExchange exchange(problem.expected, problem.row_bytes);
  const HugeBuffer copy_of_y(problem.received_bytes), copy_of_x(problem.output_bytes);

  std::vector<Operation> operations = {
      {"dispatch", [&] { ours.dispatch(); }, [&] { return problem.wrong_in(ours.received()); }},
      {"combine", [&] { ours.combine(problem.y); },
       [&] { return problem.wrong_in(ours.combined()); }},
      {"combine_in_place", [&] { ours.combine(problem.y_in_place); },
       [&] { return problem.wrong_in(ours.combined()); }}};
  for (Operation& operation : mpi_operations(problem, exchange))
    operations.push_back(std::move(operation));
  operations.push_back(
      {"memcpy",
       [&] {
         std::memcpy(copy_of_y.data(), problem.y.data, problem.y.nbytes());
         std::memcpy(copy_of_x.data(), problem.x.data, problem.x.nbytes());
       },
       [&]() -> std::int64_t {
         return std::memcmp(copy_of_y.data(), problem.y.data, problem.y.nbytes()) != 0 ||
                std::memcmp(copy_of_x.data(), problem.x.data, problem.x.nbytes()) != 0;
       }});
  long long wrong = measure(operations, problem, settings.repeats);
  MPI_Allreduce(MPI_IN_PLACE, &wrong, 1, MPI_LONG_LONG, MPI_SUM, MPI_COMM_WORLD);
  nlohmann::ordered_json json = to_json(operations, problem);
  json["wrong_elements"] = wrong;
  json["our_transport"] = buffer.transport();
  json["t1_pair_us"] = cli::summarize(measure_small_pairs(buffer, settings, mpi)).median;
  if (mpi.rank == 0) print_result(json);
  return wrong == 0 ? 0 : 1;
}

}  // namespace deep_ep::bench
