#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "bench_intranode.hpp"
#include "commands.hpp"
#include "json_file.hpp"
#include "machine.hpp"
#include "names.hpp"
#include "nodes.hpp"
#include "put_rates.hpp"
#include "ranks.hpp"
#include "report.hpp"

namespace deep_ep::cli {
namespace {

struct Options {
  const char* command = "bench intranode";
  int ranks = 0;
  std::optional<NodesAsked> nodes{};  // of `bench internode`
  std::string backend = "host";
  std::vector<int> num_sms{Config{}.num_sms};
  int chain = 0;
  std::vector<std::int64_t> tokens{4096};
  std::vector<std::int64_t> hidden{7168};
  std::vector<int> topk{8};
  std::vector<int> experts{256};
  std::vector<std::string> dtype{"bf16"};
  std::string routing = "uniform";
  std::string routing_file{};
  std::string json{};
  int num_threads = 0;
  std::int64_t num_nvl_bytes = 0;
  BenchSettings settings{};
};

std::vector<BenchShape> list_shapes(const Options& options) {
  std::vector<BenchShape> shapes;
  for (const int experts : options.experts)
    for (const int topk : options.topk)
      for (const std::int64_t hidden : options.hidden)
        for (const std::string& dtype : options.dtype)
          for (const std::int64_t tokens : options.tokens)
            for (const int num_sms : options.num_sms)
              shapes.push_back({tokens, hidden, topk, experts, dtype_from(dtype), num_sms});
  return shapes;
}

void read_routing(Options& options, bool topk_given) {
  if (options.routing != "file") {
    require(options.routing_file.empty(), "--routing-file needs --routing file, not '{}'",
            options.routing);
    options.settings.routing = verify::routing_from(options.routing);
    return;
  }
  require(!options.routing_file.empty(), "--routing file needs --routing-file");
  const TopkTable table = read_topk_file(options.routing_file);
  require(!topk_given || (options.topk.size() == 1 && options.topk[0] == table.topk),
          "--topk contradicts {}, which has {} ids a token", options.routing_file, table.topk);
  options.topk = {table.topk};
  for (const int experts : options.experts)
    for (const std::int64_t id : table.ids)
      require(id >= -1 && id < experts, "{} has expert id {}; allowed with --experts {}: -1 to {}",
              options.routing_file, id, experts, experts - 1);
  options.settings.table = table;
}

nlohmann::ordered_json args_json(const Options& options, const Buffer& buffer) {
  nlohmann::ordered_json json;
  json["ranks"] = buffer.num_ranks();
  json["nodes"] = buffer.num_nodes();
  json["tokens"] = options.tokens;
  json["hidden"] = options.hidden;
  json["topk"] = options.topk;
  json["experts"] = options.experts;
  json["dtype"] = options.dtype;
  json["routing"] = options.routing;
  json["routing_file"] = options.routing_file;
  json["skew"] = options.settings.skew;
  json["seed"] = options.settings.seed;
  json["iters"] = options.settings.iterations;
  json["warmup"] = options.settings.warmup;
  json["check"] = options.settings.check;
  json["backend"] = options.backend;
  json["comm_stream"] = options.settings.on_comm_stream;
  json["chain"] = options.settings.chain;
  json["num_sms"] = options.num_sms;
  json["num_threads"] = options.num_threads;
  json["live_results"] = options.settings.live_results;
  return json;
}

// On stderr, so that a table in a file stays a table; a terminal keeps one line of it.
void print_progress(std::size_t done, std::size_t count, const BenchShape& shape) {
  if (count < 2) return;
  const bool terminal = isatty(STDERR_FILENO) != 0;
  fmt::print(stderr, "{}[{}/{}] tokens {} hidden {} topk {} experts {} {} sms {}{}",
             terminal ? "\r\033[K" : "", done + 1, count, shape.tokens, shape.hidden, shape.topk,
             shape.experts, short_name(shape.dtype), shape.num_sms, terminal ? "" : "\n");
  std::fflush(stderr);
}

void clear_progress(std::size_t count) {
  if (count >= 2 && isatty(STDERR_FILENO) != 0) fmt::print(stderr, "\r\033[K");
}

int run_sweep(const std::shared_ptr<Bootstrap>& bootstrap, Options options) {
  const std::vector<BenchShape> shapes = list_shapes(options);
  const bool first = bootstrap->rank() == 0;
  BufferOptions buffer_options;
  buffer_options.device = device_from(options.backend, bootstrap->rank());
  buffer_options.num_threads = options.num_threads;
  buffer_options.num_nvl_bytes = options.num_nvl_bytes;
  if (options.nodes) {
    options.settings.ranks_per_node = find_nodes(*bootstrap, *options.nodes).ranks_per_node;
    const std::int64_t row = options.hidden.front() * static_cast<std::int64_t>(sizeof(float));
    buffer_options.num_rdma_bytes = Config{}.get_rdma_buffer_size_hint(row, bootstrap->size());
  }
  Buffer buffer(bootstrap, buffer_options);
  require(options.nodes || buffer.num_nodes() == 1,
          "the launcher has started ranks of {} nodes: use bench internode", buffer.num_nodes());
  if (first) {
    print_bench_header(options.command, bootstrap->size(), options.settings, buffer.transport());
  }
  std::optional<PutRates> puts;
  if (options.nodes && options.backend == "cuda") {
    puts = measure_put_rates(buffer, *bootstrap, options.settings.ranks_per_node, options.num_sms);
    if (first) print_put_rates(*puts);
  }
  const PutRates* beside = puts ? &*puts : nullptr;
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  std::int64_t wrong = puts ? puts->wrong_words() : 0;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    if (first) print_progress(i, shapes.size(), shapes[i]);
    const auto rows = bench_intranode(buffer, *bootstrap, shapes[i], options.settings);
    if (first) clear_progress(shapes.size());
    for (const BenchRow& row : rows) {
      wrong += row.wrong_elements;
      if (!first) continue;
      print_bench_row(shapes[i], row, beside);
      results.push_back(bench_row_json(shapes[i], row, beside));
    }
  }
  if (first && !options.json.empty()) {
    nlohmann::ordered_json json;
    json["command"] = options.command;
    json["args"] = args_json(options, buffer);
    json["environment"] = environment_json();
    if (options.backend == "cuda") json["gpus"] = describe_devices(DeviceType::kCuda);
    json["transport"] = buffer.transport();
    json["mapped_bytes"] = buffer.mapped_bytes();
    if (puts) json["puts"] = put_rates_json(*puts);
    json["results"] = results;
    json["checked"] = options.settings.check;
    json["wrong_elements"] = wrong;
    write_json(options.json, json);
  }
  if (first && wrong > 0) fmt::print("FAILED: {} wrong elements\n", wrong);
  return wrong == 0 ? 0 : 1;
}

void validate(const Options& options, int ranks) {
  const BenchSettings& settings = options.settings;
  require(settings.iterations >= 1, "--iters {} must be at least 1", settings.iterations);
  require(settings.warmup >= 0, "--warmup {} must not be negative", settings.warmup);
  require(settings.live_results >= 1, "--live-results {} must be at least 1",
          settings.live_results);
  require(settings.chain >= 1, "--chain {} must be at least 1", settings.chain);
  require(!settings.graph || options.backend == "cuda", "--graph is for --backend cuda, not '{}'",
          options.backend);
  for (const int num_sms : options.num_sms) {
    Config config;
    config.num_sms = num_sms;
    config.validate();
  }
  // Before hours of measuring, not after.
  if (!options.json.empty()) check_writable(options.json);
  for (const BenchShape& shape : list_shapes(options))
    verify::validate(make_bench_case(shape, settings, ranks));
}

void add_shape_options(CLI::App& command, Options& options) {
  command.add_option("--tokens", options.tokens, "Tokens of a rank")->delimiter(',');
  command.add_option("--hidden", options.hidden, "Values of a row")->delimiter(',');
  command.add_option("--topk", options.topk, "Experts of a token")->delimiter(',');
  command.add_option("--experts", options.experts, "Experts of all ranks")->delimiter(',');
  command.add_option("--dtype", options.dtype, "bf16, fp16, fp32, fp8 (with scales), bytes")
      ->delimiter(',');
  command.add_option("--routing", options.routing,
                     "uniform, zipf, grouped, all-to-all, to-rank-zero, to-self, holes, duplicates "
                     "or file");
  command.add_option(
      "--routing-file", options.routing_file,
      "Recorded top-k ids: .npy [tokens, topk] of int32 or int64, or text, a token a "
      "line. Rank r takes the tokens from row r * tokens on, starting over at the end");
  command.add_option("--skew", options.settings.skew, "Exponent of zipf");
}

void add_run_options(CLI::App& command, Options& options) {
  BenchSettings& settings = options.settings;
  command.add_option("--iters", settings.iterations, "Timed iterations");
  command.add_option("--warmup", settings.warmup, "Iterations before them");
  command.add_flag("--check,!--no-check", settings.check,
                   "Compare the benchmarked results with the reference (default: on)");
  command.add_option("--json", options.json, "File for the results");
  command.add_option("--num-sms", options.num_sms, "Config::num_sms")->delimiter(',');
  command.add_flag("--comm-stream", settings.on_comm_stream,
                   "On GPUs the caller works on the Buffer's own stream");
  command.add_option("--chain", options.chain,
                     "Calls in each timed iteration; 0: 1 on the host, 100 on GPUs");
  command.add_option("--num-threads", options.num_threads,
                     "Worker threads of a rank; 0: cores / ranks");
  command.add_option("--num-nvl-bytes", options.num_nvl_bytes, "Starting size of mapped memory");
  command.add_option("--seed", settings.seed, "Of routing and payload");
  command.add_option("--live-results", settings.live_results,
                     "Dispatch results that are held while further calls run");
  command.add_flag("--graph", settings.graph,
                   "On GPUs: also chains as a CUDA graph, which keeps the results of all calls");
  command.add_flag("--pair-latency", settings.pair_latency,
                   "Also chains of dispatch and combine without barriers, as layers run");
}

int run_bench(const CLI::App& command, Options& options, int ranks) {
  read_routing(options, command.count("--topk") > 0);
  options.settings.chain =
      options.chain != 0 ? options.chain : (options.backend == "cuda" ? 100 : 1);
  validate(options, ranks);
  return run_ranks(
      ranks, [&](std::shared_ptr<Bootstrap> bootstrap) { return run_sweep(bootstrap, options); });
}

void add_bench_internode(CLI::App& bench, int& status) {
  CLI::App* command =
      bench.add_subcommand("internode", "The same operations as intranode over several nodes");
  const auto options = std::make_shared<Options>();
  options->command = "bench internode";
  options->nodes.emplace();
  command->option_defaults()->always_capture_default();
  command->add_option("--backend", options->backend, kBackends);
  add_node_options(*command, *options->nodes);
  add_shape_options(*command, *options);
  add_run_options(*command, *options);
  command->callback([command, options, &status] {
    status = run_bench(*command, *options, count_node_ranks(*options->nodes));
  });
}

}  // namespace

void add_bench(CLI::App& app, int& status) {
  CLI::App* bench = app.add_subcommand("bench", "How fast the calls are on this machine");
  bench->require_subcommand(1);
  add_bench_low_latency(*bench, status);
  add_bench_internode(*bench, status);
  CLI::App* command = bench->add_subcommand(
      "intranode", "Layout, dispatch, combine and pairs among ranks of this machine");
  const auto options = std::make_shared<Options>();
  command->option_defaults()->always_capture_default();
  command->add_option("--ranks", options->ranks, "Ranks, one process each")->default_str("4");
  command->add_option("--backend", options->backend, kBackends);
  add_shape_options(*command, *options);
  add_run_options(*command, *options);
  command->footer(
      "Lists (1,128,4096) make a sweep. The exit status is 0 only if every rank ended "
      "well and no element was wrong.");
  command->callback([command, options, &status] {
    status = run_bench(*command, *options, count_ranks(options->ranks, 4));
  });
}

}  // namespace deep_ep::cli
