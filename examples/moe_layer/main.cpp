// A mixture-of-experts model on several processes, its tokens moved by this library, checked
// against the same model on one process. Read it in this order: main.cpp (who does what),
// distributed.cpp (the five steps of a layer), one_process.cpp (the check), model.cpp (the maths).

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include <CLI/CLI.hpp>
#include <deep_ep/deep_ep.hpp>

#include "distributed.hpp"
#include "model.hpp"
#include "one_process.hpp"
#include "report.hpp"

namespace {

using namespace moe;

struct Options {
  std::string text = MOE_LAYER_TEXT;
  std::int64_t tokens = 0;
  int ranks = 4;
  bool skew = false;
  ModelShape shape;
};

std::string read_text(const Options& options) {
  std::ifstream file(options.text, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file || text.empty()) throw std::runtime_error(options.text + ": cannot be read, or empty");
  if (options.tokens > 0)
    text.resize(std::min(text.size(), static_cast<std::size_t>(options.tokens)));
  return text;
}

void check(const ModelShape& shape, int ranks) {
  const auto refuse_if = [](bool wrong, const std::string& why) {
    if (wrong) throw std::runtime_error(why);
  };
  refuse_if(shape.experts % ranks != 0,
            fmt::format("--experts {} must be a multiple of the {} ranks", shape.experts, ranks));
  refuse_if(shape.topk > shape.experts,
            fmt::format("--topk {} must be at most --experts {}", shape.topk, shape.experts));
  refuse_if(shape.hidden % 8 != 0,
            fmt::format("--hidden {} must be a multiple of 8 (rows are BF16 and multiples of 16 "
                        "bytes)",
                        shape.hidden));
}

/// Where each rank's tokens begin, and the end. Uneven on purpose, as batches are: rank r gets a
/// share of r + 2, with `skew` half of what is left, and the last of several ranks nothing.
std::vector<std::int64_t> split(std::int64_t tokens, int ranks, bool skew) {
  std::vector<double> shares;
  for (int r = 0; r < ranks; ++r) shares.push_back(skew ? std::ldexp(1.0, -r) : r + 2.0);
  if (skew && ranks > 1) shares.back() = 0;
  double all = 0, before = 0;
  for (const double share : shares) all += share;
  std::vector<std::int64_t> starts{0};
  for (const double share : shares) {
    before += share;
    starts.push_back(static_cast<std::int64_t>(static_cast<double>(tokens) * before / all));
  }
  starts.back() = tokens;
  return starts;
}

/// The bytes of `values` of every rank, in rank order.
std::vector<std::string> gather(deep_ep::Bootstrap& bootstrap, const void* values,
                                std::size_t bytes) {
  return bootstrap.all_gather({static_cast<const char*>(values), bytes});
}

/// Sums of the counts and maxima of the times of all ranks.
Account merge(deep_ep::Bootstrap& bootstrap, const Account& mine) {
  std::vector<std::int64_t> counts{mine.rows, mine.rows_to_self};
  counts.insert(counts.end(), mine.load.begin(), mine.load.end());
  std::vector<std::int64_t> sums(counts.size());
  for (const std::string& bytes :
       gather(bootstrap, counts.data(), counts.size() * sizeof(std::int64_t))) {
    std::memcpy(counts.data(), bytes.data(), bytes.size());
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += counts[i];
  }
  Account all{.rows = sums[0], .rows_to_self = sums[1], .load = {sums.begin() + 2, sums.end()}};
  std::array<double, kNumPhases> seconds{};
  for (const std::string& bytes : gather(bootstrap, mine.seconds.data(), sizeof(mine.seconds))) {
    std::memcpy(seconds.data(), bytes.data(), sizeof(seconds));
    for (std::size_t i = 0; i < seconds.size(); ++i)
      all.seconds[i] = std::max(all.seconds[i], seconds[i]);
  }
  return all;
}

/// The rows of all ranks below each other, which is the order of the text.
Bf16Rows gather_rows(deep_ep::Bootstrap& bootstrap, const Bf16Rows& mine) {
  std::string all;
  const auto bytes = static_cast<std::size_t>(mine.size()) * sizeof(Eigen::bfloat16);
  for (const std::string& part : gather(bootstrap, mine.data(), bytes)) all += part;
  const auto values = static_cast<Eigen::Index>(all.size() / sizeof(Eigen::bfloat16));
  Bf16Rows rows(values / mine.cols(), mine.cols());
  std::memcpy(rows.data(), all.data(), all.size());
  return rows;
}

/// Rank 0: every layer again on this process alone. A layer is checked from the input that the
/// ranks had, so that a bound holds for each: behind a rounding, a token close to the border
/// between two experts may rightly choose the other one in the next layer.
bool verify(const Options& options, const std::string& text, const std::vector<Bf16Rows>& outputs) {
  const auto start = std::chrono::steady_clock::now();
  Rows x = embed(options.shape, text, 0, static_cast<std::int64_t>(text.size()));
  std::int64_t values = 0, outside = 0;
  fmt::print("\ndifference to the same layers on one process\n");
  for (int index = 0; index < options.shape.layers; ++index) {
    const Bf16Rows& output = outputs[static_cast<std::size_t>(index)];
    const Layer layer = make_layer(options.shape, index, 0, options.shape.experts);
    const Difference difference = compare(run_layer_alone(layer, x), output);
    print_difference(index + 1, difference);
    values += difference.values;
    outside += difference.outside;
    x += output.cast<float>();
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  print_verdict(values, outside, took.count());
  return outside == 0;
}

/// What each rank runs; the exit status.
int run_rank(const Options& options, const std::string& text,
             const std::shared_ptr<deep_ep::Bootstrap>& bootstrap) {
  const int rank = bootstrap->rank(), ranks = bootstrap->size();
  const ModelShape& shape = options.shape;
  const std::vector<std::int64_t> starts =
      split(static_cast<std::int64_t>(text.size()), ranks, options.skew);

  const std::int64_t first = starts[static_cast<std::size_t>(rank)];
  const std::int64_t count = starts[static_cast<std::size_t>(rank) + 1] - first;
  const int local_experts = shape.experts / ranks;
  Rows x = embed(shape, text, first, count);
  Account account;
  std::vector<Bf16Rows> outputs;
  {
    deep_ep::Buffer buffer(bootstrap);
    for (int index = 0; index < shape.layers; ++index) {
      const Layer layer = make_layer(shape, index, rank * local_experts, local_experts);
      outputs.push_back(run_layer_on_ranks(buffer, layer, x, account));
      x += outputs.back().cast<float>();
    }
  }

  const Account total = merge(*bootstrap, account);
  for (Bf16Rows& output : outputs) output = gather_rows(*bootstrap, output);
  if (rank != 0) return 0;
  Run run{options.text, shape, {}};
  for (std::size_t r = 0; r + 1 < starts.size(); ++r)
    run.tokens.push_back(starts[r + 1] - starts[r]);
  print_run(run);
  print_load(run, total);
  print_bytes(run, total);
  print_times(total);
  return verify(options, text, outputs) ? 0 : 1;
}

void add_flags(CLI::App& app, Options& options) {
  const auto positive = CLI::Range(1, 1 << 20);
  app.add_option("--text", options.text, "The text to read")->capture_default_str();
  app.add_option("--tokens", options.tokens, "Read this many bytes of it at most; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--ranks", options.ranks,
                 "Processes to start, unless torchrun, mpirun or srun did")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_flag("--skew", options.skew, "Give most tokens to rank 0 and none to the last rank");
  app.add_option("--layers", options.shape.layers, "Layers")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--experts", options.shape.experts, "Experts of a layer, a multiple of the ranks")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--topk", options.shape.topk, "Experts that each token visits")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--hidden", options.shape.hidden, "Values of a token, a multiple of 8")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--intermediate", options.shape.intermediate,
                 "Values inside an expert [2 * hidden]")
      ->check(positive);
  app.add_option("--seed", options.shape.seed, "Seed of all weights")->capture_default_str();
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  options.shape.intermediate = 0;
  CLI::App app("A mixture-of-experts model on several processes, checked against one process.");
  add_flags(app, options);
  CLI11_PARSE(app, argc, argv);
  if (options.shape.intermediate == 0) options.shape.intermediate = 2 * options.shape.hidden;
  try {
    const std::string text = read_text(options);
    // Started by torchrun, mpirun or srun, this process is one of the ranks already.
    const auto environment = deep_ep::bootstrap_from_environment();
    const bool started = environment->size() > 1;
    check(options.shape, started ? environment->size() : options.ranks);
    if (started) return run_rank(options, text, environment);

    int status = 0;
    const auto exits = deep_ep::run_forked(
        options.ranks, [&](auto bootstrap) { return run_rank(options, text, bootstrap); });
    for (const deep_ep::RankExit& exit : exits) status = std::max(status, exit.status);
    return status;
  } catch (const std::exception& error) {
    fmt::print(stderr, "moe_layer: {}\n", error.what());
    return 1;
  }
}
