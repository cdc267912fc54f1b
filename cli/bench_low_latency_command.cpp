#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "bench_low_latency.hpp"
#include "commands.hpp"
#include "deep_ep/version.hpp"
#include "json_file.hpp"
#include "machine.hpp"
#include "names.hpp"
#include "nodes.hpp"
#include "ranks.hpp"
#include "report.hpp"
#include "stats.hpp"

namespace deep_ep::cli {
namespace {

using verify::LowLatencyCase;

struct Options {
  int ranks = 0;
  NodesAsked nodes{};
  std::string backend = "host";
  std::vector<std::int64_t> tokens{1, 16, 128};
  std::int64_t max_tokens = 0;
  std::vector<std::string> payloads{"fp8"};
  std::vector<std::string> formats{"expert-major"};
  std::vector<std::string> wires{"bf16"};
  std::vector<std::string> modes{"eager"};
  std::string routing = "uniform";
  std::string json{};
  int num_threads = 0;
  LowLatencyCase c{};
  LowLatencyBenchSettings settings{};
};

std::vector<LowLatencyCase> list_cases(const Options& options, int ranks) {
  std::vector<LowLatencyCase> cases;
  for (const std::string& format : options.formats) {
    require(format == "expert-major" || format == "rank-major",
            "--format '{}' must be expert-major or rank-major", format);
    for (const std::string& payload : options.payloads) {
      for (const std::string& wire : options.wires) {
        for (const std::int64_t tokens : options.tokens) {
          LowLatencyCase c = options.c;
          c.ranks = ranks;
          c.tokens = {tokens};
          c.max_tokens = std::max<std::int64_t>(options.max_tokens, 0);
          c.payload = verify::low_latency_payload_from(payload);
          c.wire = verify::wire_from(wire);
          c.routing = verify::routing_from(options.routing);
          c.rank_major = format == "rank-major";
          cases.push_back(c);
        }
      }
    }
  }
  return cases;
}

void print_header(const Buffer& buffer, const Options& options) {
  const Machine machine = read_machine();
  fmt::print("# deepep {} bench low-latency on {} ({}, {} cores), {}\n", version(), machine.host,
             machine.cpu, machine.cores, now());
  fmt::print("# {}, {} bytes mapped for low latency\n", buffer.transport(), buffer.mapped_bytes());
  fmt::print("# ranks {}, routing {}, seed {}, warmup {}, iterations {} of {} calls\n",
             buffer.num_ranks(), options.routing, options.c.seed, options.settings.warmup,
             options.settings.iterations, options.settings.chain);
  fmt::print(
      "# time: a call, of each iteration's slowest rank, calls chained, eager by the host's clock, "
      "in "
      "a graph by the GPU's;\n# bytes: received payload of a rank (mean), wire: without its own "
      "rows; wrong: elements of the benchmarked results "
      "that differ from the reference\n");
  fmt::print(
      "#{:>6} {:>5} {:>7} {:>5} {:>8} {:>13} {:>12} {:>6} {:>5}  {:<13} {:>10} {:>10} {:>10} "
      "{:>12} "
      "{:>6}\n",
      "tokens", "max", "hidden", "topk", "experts", "payload", "format", "home", "mode",
      "operation", "median us", "p99 us", "min us", "wire bytes", "wrong");
}

const char* format_name(const LowLatencyCase& c) {
  return c.rank_major ? "rank-major" : "expert-major";
}

void print_row(const LowLatencyCase& c, BenchMode mode, const BenchRow& row) {
  const Summary times = summarize(row.times_us);
  fmt::print(
      " {:>6} {:>5} {:>7} {:>5} {:>8} {:>13} {:>12} {:>6} {:>5}  {:<13} {:>10.1f} {:>10.1f} "
      "{:>10.1f} {:>12.0f} {:>6}\n",
      c.tokens[0], c.capacity(), c.hidden, c.topk, c.experts, verify::to_string(c.payload),
      format_name(c), verify::to_string(c.wire), to_string(mode), row.operation, times.median,
      times.p99, times.min, row.wire_bytes,
      row.checked_elements == 0 ? std::string("-") : std::to_string(row.wrong_elements));
  if (!row.first_mismatch.empty()) fmt::print("   first wrong: {}\n", row.first_mismatch);
  std::fflush(stdout);
}

nlohmann::ordered_json row_json(const LowLatencyCase& c, BenchMode mode, const BenchRow& row) {
  nlohmann::ordered_json json;
  json["tokens"] = c.tokens[0];
  json["max_tokens"] = c.capacity();
  json["hidden"] = c.hidden;
  json["topk"] = c.topk;
  json["experts"] = c.experts;
  json["payload"] = verify::to_string(c.payload);
  json["format"] = format_name(c);
  json["wire"] = verify::to_string(c.wire);
  json["mode"] = to_string(mode);
  add_times(row, json);
  add_checks(row, json);
  return json;
}

nlohmann::ordered_json report_json(const Buffer& buffer, const Options& options) {
  nlohmann::ordered_json json;
  json["command"] = "bench low-latency";
  json["args"] = {{"ranks", buffer.num_ranks()},
                  {"nodes", buffer.num_nodes()},
                  {"backend", options.backend},
                  {"routing", options.routing},
                  {"seed", options.c.seed},
                  {"iters", options.settings.iterations},
                  {"warmup", options.settings.warmup},
                  {"chain", options.settings.chain},
                  {"check", options.settings.check},
                  {"num_threads", options.num_threads}};
  json["environment"] = environment_json();
  if (options.backend == "cuda") json["gpus"] = describe_devices(DeviceType::kCuda);
  json["transport"] = buffer.transport();
  json["mapped_bytes"] = buffer.mapped_bytes();
  return json;
}

int run_sweep(const std::shared_ptr<Bootstrap>& bootstrap, const Options& options) {
  std::vector<LowLatencyCase> cases = list_cases(options, bootstrap->size());
  const int ranks_per_node = find_ranks_per_node(*bootstrap, options.nodes);
  for (LowLatencyCase& c : cases) c.ranks_per_node = ranks_per_node;
  const bool first = bootstrap->rank() == 0;
  BufferOptions buffer_options;
  buffer_options.device = device_from(options.backend, bootstrap->rank());
  buffer_options.num_threads = options.num_threads;
  buffer_options.low_latency_mode = true;
  for (const LowLatencyCase& c : cases)
    buffer_options.num_rdma_bytes = std::max(buffer_options.num_rdma_bytes, c.buffer_bytes());
  Buffer buffer(bootstrap, buffer_options);
  if (first) print_header(buffer, options);
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  std::int64_t wrong = 0;
  for (const LowLatencyCase& c : cases) {
    for (const std::string& name : options.modes) {
      const BenchMode mode = bench_mode_from(name);
      for (const BenchRow& row : bench_low_latency(buffer, *bootstrap, c, options.settings, mode)) {
        wrong += row.wrong_elements;
        if (!first) continue;
        print_row(c, mode, row);
        results.push_back(row_json(c, mode, row));
      }
    }
  }
  if (first && !options.json.empty()) {
    nlohmann::ordered_json json = report_json(buffer, options);
    json["results"] = results;
    json["wrong_elements"] = wrong;
    write_json(options.json, json);
  }
  if (first && wrong > 0) fmt::print("FAILED: {} wrong elements\n", wrong);
  return wrong == 0 ? 0 : 1;
}

void add_options(CLI::App& command, Options& options) {
  LowLatencyBenchSettings& settings = options.settings;
  command.add_option("--tokens", options.tokens, "Tokens of a rank")->delimiter(',');
  command.add_option("--max-tokens", options.max_tokens,
                     "Capacity of all calls; 0: as many as there are tokens");
  command.add_option("--hidden", options.c.hidden, "Values of a row");
  command.add_option("--topk", options.c.topk, "Experts of a token");
  command.add_option("--experts", options.c.experts, "Experts of all ranks");
  command
      .add_option("--payload", options.payloads,
                  "bf16, fp8, fp8-rounded, fp8-ue8m0, fp16, fp32, bytes, scaled-fp8, scaled-packed")
      ->delimiter(',');
  command.add_option("--format", options.formats, "expert-major, rank-major")->delimiter(',');
  command.add_option("--wire", options.wires, "How rows come home: bf16, logfmt, fp8")
      ->delimiter(',');
  command
      .add_option("--mode", options.modes,
                  "eager; on GPUs also graph: chains in a CUDA graph, timed on the GPU")
      ->delimiter(',');
  command.add_option("--routing", options.routing, "As for verify");
  command.add_option("--iters", settings.iterations, "Timed iterations");
  command.add_option("--warmup", settings.warmup, "Iterations before them");
  command.add_option("--chain", settings.chain, "Calls in each timed iteration");
  command.add_flag("--check,!--no-check", settings.check,
                   "Compare the benchmarked results with the reference (default: on)");
  command.add_flag("--comm-stream", settings.on_comm_stream,
                   "On GPUs the caller works on the Buffer's own stream");
  command.add_option("--num-threads", options.num_threads,
                     "Worker threads of a rank; 0: cores / ranks");
  command.add_option("--seed", options.c.seed, "Of routing and payload");
  command.add_option("--json", options.json, "File for the results");
}

}  // namespace

void add_bench_low_latency(CLI::App& bench, int& status) {
  CLI::App* command = bench.add_subcommand(
      "low-latency", "Dispatch, combine and pairs of small batches, with and without hooks");
  const auto options = std::make_shared<Options>();
  options->c.hidden = 7168;
  options->c.experts = 256;
  command->option_defaults()->always_capture_default();
  command->add_option("--ranks", options->ranks, "Ranks, one process each")->default_str("4");
  add_node_options(*command, options->nodes, true);
  command->add_option("--backend", options->backend, kBackends);
  add_options(*command, *options);
  command->footer("Lists make a sweep, which runs on one Buffer.");
  command->callback([options, &status] {
    const int ranks = count_ranks(options->ranks, 4, options->nodes);
    const LowLatencyBenchSettings& settings = options->settings;
    require(settings.iterations >= 1 && settings.warmup >= 0 && settings.chain >= 1,
            "--iters {} and --chain {} must be at least 1, --warmup {} at least 0",
            settings.iterations, settings.chain, settings.warmup);
    if (!options->json.empty()) check_writable(options->json);
    for (const std::string& mode : options->modes)
      require(bench_mode_from(mode) == BenchMode::kEager || options->backend == "cuda",
              "--mode graph needs --backend cuda, not '{}'", options->backend);
    for (const LowLatencyCase& c : list_cases(*options, ranks)) verify::validate(c);
    status = run_ranks(ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
      return run_sweep(bootstrap, *options);
    });
  });
}

}  // namespace deep_ep::cli
