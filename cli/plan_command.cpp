#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "commands.hpp"
#include "deep_ep/version.hpp"
#include "json_file.hpp"
#include "plan/prediction.hpp"
#include "plan/topology.hpp"
#include "topk_file.hpp"
#include "verify/routing.hpp"

namespace deep_ep::cli {
namespace {

struct Options {
  std::vector<int> nodes{1, 2, 4, 8, 16, 32, 64, 128, 256};
  int ranks_per_node = 8;
  Gate gate{};
  std::int64_t low_latency_tokens = 128;
  std::string routing = "uniform";
  std::string routing_file{};
  std::string dtype = "fp8";
  std::uint64_t seed = 1;
  Payload payload{};
  Machine machine{};
  std::string json{};
};

constexpr double kMega = 1e6;

void set_payload(Options& options) {
  const std::string& dtype = options.dtype;
  require(dtype == "fp8" || dtype == "bf16" || dtype == "fp16" || dtype == "fp32",
          "--dtype '{}' is unknown; allowed: bf16, fp16, fp32, fp8", dtype);
  constexpr int kScaleGroup = 128;
  options.payload.value_bytes = dtype == "fp8" ? 1 : dtype == "fp32" ? 4 : 2;
  options.payload.scale_group = dtype == "fp8" ? kScaleGroup : 0;
  options.payload.sum_bytes = dtype == "fp32" ? 4 : 2;
}

void validate(const Options& options) {
  const Machine& machine = options.machine;
  for (const auto& [value, name] : {std::pair(machine.local_gbps, "--local-gbps"),
                                    {machine.network_gbps, "--network-gbps"},
                                    {machine.network_mrate, "--network-mrate"},
                                    {machine.write_gbps, "--write-gbps"},
                                    {machine.sum_gbps, "--sum-gbps"},
                                    {machine.low_latency_write_gbps, "--ll-write-gbps"},
                                    {machine.low_latency_sum_gbps, "--ll-sum-gbps"}})
    require(value > 0, "{} is {}, must be above 0", name, value);
  require(machine.chunk_rows >= 1, "--chunk-rows is {}, must be at least 1", machine.chunk_rows);
  require(options.payload.hidden >= 1, "--hidden is {}, must be at least 1",
          options.payload.hidden);
  require(options.routing == "uniform" || options.routing == "limited" ||
              options.routing == "zipf" || options.routing == "file",
          "--routing '{}' is unknown; allowed: uniform, limited, zipf, file", options.routing);
  require((options.routing == "limited") == (options.gate.max_nodes > 0),
          "--routing limited and --max-nodes need each other");
  require((options.routing == "file") == !options.routing_file.empty(),
          "--routing file and --routing-file need each other");
  if (!options.json.empty()) check_writable(options.json);
}

/// Counted where the routing is drawn or read, else expected.
Traffic traffic_of(const Options& options, const Topology& topology, const Gate& gate,
                   const TopkTable& table) {
  if (options.routing == "file") {
    for (const std::int64_t id : table.ids)
      require(id >= -1 && id < gate.experts, "{} has expert id {}; allowed are -1 to {}",
              options.routing_file, id, gate.experts - 1);
    return count_traffic(topology, gate,
                         [&](int rank) { return take_rows(table, rank, gate.tokens); });
  }
  if (options.routing != "zipf") return expected_traffic(topology, gate);
  return count_traffic(topology, gate, [&](int rank) {
    verify::RoutingSpec spec;
    spec.routing = verify::Routing::kZipf;
    spec.tokens = gate.tokens;
    spec.topk = gate.topk;
    spec.experts = gate.experts;
    spec.ranks = topology.ranks();
    spec.rank = rank;
    spec.seed = options.seed;
    spec.skew = gate.skew;
    return verify::make_routing(spec);
  });
}

nlohmann::ordered_json load_json(const Load& load) {
  return {{"mean", load.mean}, {"busiest", load.busiest}};
}

nlohmann::ordered_json row_json(const Topology& topology, const Gate& gate, const Traffic& traffic,
                                const Prediction& one) {
  return {{"nodes", topology.nodes},
          {"ranks", topology.ranks()},
          {"experts", gate.experts},
          {"tokens", gate.tokens},
          {"operation", to_string(one.operation)},
          {"ranks_per_token", traffic.ranks_per_token},
          {"nodes_per_token", traffic.nodes_per_token},
          {"received_rows", load_json(traffic.received)},
          {"row_bytes", one.row_bytes},
          {"network_row_bytes", one.network_row_bytes},
          {"own_bytes", one.own_bytes},
          {"local_bytes", load_json(one.local_bytes)},
          {"network_bytes", load_json(one.network_bytes)},
          {"local_messages", one.local_messages},
          {"network_messages", one.network_messages},
          {"wait_us", one.wait_us},
          {"local_us", one.local_us},
          {"network_us", one.network_us},
          {"compute_us", one.compute_us},
          {"total_us", one.total_us},
          {"bound", one.bound},
          {"memory_bytes", one.memory_bytes}};
}

void print_header(const Options& options) {
  fmt::print(
      "deepep {} plan: of the busiest rank, a call; {} ranks a node, hidden {}, top-{}, {}, "
      "routing "
      "{}; local {} GB/s {} us, network {} GB/s {} us; MB are 10^6 bytes\n",
      version(), options.ranks_per_node, options.payload.hidden, options.gate.topk, options.dtype,
      options.routing, options.machine.local_gbps, options.machine.local_us,
      options.machine.network_gbps, options.machine.network_us);
  fmt::print(
      "{:>5} {:>5} {:>7} {:>6}  {:<20} {:>6} {:>8} {:>8} {:>9} {:>7} {:>7} {:>8} {:>8} "
      "{:>8} {:<10} {:>8}\n",
      "nodes", "ranks", "experts", "tokens", "operation", "ranks", "local", "network", "messages",
      "waits", "local", "network", "process", "total", "bound by", "memory");
  fmt::print(
      "{:>5} {:>5} {:>7} {:>6}  {:<20} {:>6} {:>8} {:>8} {:>9} {:>7} {:>7} {:>8} {:>8} "
      "{:>8} {:<10} {:>8}\n",
      "", "", "", "", "", "/token", "MB", "MB", "network", "us", "us", "us", "us", "us", "", "MB");
}

void print_row(const Topology& topology, const Gate& gate, const Traffic& traffic,
               const Prediction& one) {
  fmt::print(
      "{:>5} {:>5} {:>7} {:>6}  {:<20} {:>6.2f} {:>8.2f} {:>8.2f} {:>9.0f} {:>7.1f} {:>7.1f} "
      "{:>8.1f} {:>8.1f} {:>8.1f} {:<10} {:>8.1f}\n",
      topology.nodes, topology.ranks(), gate.experts, gate.tokens, to_string(one.operation),
      traffic.ranks_per_token, one.local_bytes.busiest / kMega, one.network_bytes.busiest / kMega,
      one.network_messages, one.wait_us, one.local_us, one.network_us, one.compute_us, one.total_us,
      one.bound, one.memory_bytes / kMega);
}

/// Every rank owns as many experts as others: more ranks than experts get one each.
int experts_for(const Topology& topology, int experts) {
  return std::max(experts, topology.ranks());
}

nlohmann::ordered_json plan_topology(const Options& options, const TopkTable& table,
                                     const Topology& topology) {
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (const bool low_latency : {false, true}) {
    Gate gate = options.gate;
    gate.experts = experts_for(topology, gate.experts);
    if (low_latency) gate.tokens = options.low_latency_tokens;
    const Traffic traffic = traffic_of(options, topology, gate, table);
    const auto predict = low_latency ? predict_low_latency : predict_high_throughput;
    for (const Prediction& one :
         predict(topology, gate, options.payload, options.machine, traffic)) {
      print_row(topology, gate, traffic, one);
      results.push_back(row_json(topology, gate, traffic, one));
    }
  }
  return results;
}

nlohmann::ordered_json args_json(const Options& options) {
  const Machine& machine = options.machine;
  return {{"nodes", options.nodes},
          {"ranks_per_node", options.ranks_per_node},
          {"tokens", options.gate.tokens},
          {"low_latency_tokens", options.low_latency_tokens},
          {"hidden", options.payload.hidden},
          {"topk", options.gate.topk},
          {"experts", options.gate.experts},
          {"dtype", options.dtype},
          {"routing", options.routing},
          {"routing_file", options.routing_file},
          {"max_nodes", options.gate.max_nodes},
          {"skew", options.gate.skew},
          {"local_gbps", machine.local_gbps},
          {"network_gbps", machine.network_gbps},
          {"local_us", machine.local_us},
          {"network_us", machine.network_us},
          {"network_mrate", machine.network_mrate},
          {"call_us", machine.call_us},
          {"write_gbps", machine.write_gbps},
          {"sum_gbps", machine.sum_gbps},
          {"low_latency_call_us", machine.low_latency_call_us},
          {"low_latency_write_gbps", machine.low_latency_write_gbps},
          {"low_latency_sum_gbps", machine.low_latency_sum_gbps},
          {"chunk_rows", machine.chunk_rows}};
}

void run_plan(Options& options) {
  set_payload(options);
  validate(options);
  TopkTable table;
  if (options.routing == "file") {
    table = read_topk_file(options.routing_file);
    options.gate.topk = table.topk;
  }
  // For the size hints, which count nodes by it.
  setenv("DEEP_EP_RANKS_PER_NODE",  // NOLINT(concurrency-mt-unsafe): no other thread runs
         std::to_string(options.ranks_per_node).c_str(), 1);
  print_header(options);
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (const int nodes : options.nodes)
    for (const auto& row :
         plan_topology(options, table, {.nodes = nodes, .ranks_per_node = options.ranks_per_node}))
      results.push_back(row);
  if (!options.nodes.empty() &&
      *std::max_element(options.nodes.begin(), options.nodes.end()) > plan::kMaxNodes)
    fmt::print("This version connects {} nodes of {} ranks at most.\n", plan::kMaxNodes,
               plan::kMaxRanksPerNode);
  if (options.json.empty()) return;
  write_json(options.json, {{"command", "plan"},
                            {"args", args_json(options)},
                            {"version", version()},
                            {"results", results}});
}

void add_gate_options(CLI::App& command, Options& options) {
  command.add_option("--nodes", options.nodes, "Numbers of nodes")->delimiter(',');
  command.add_option("--ranks-per-node", options.ranks_per_node, "Ranks of a node");
  command.add_option("--tokens", options.gate.tokens, "Tokens of a rank, high throughput");
  command.add_option("--ll-tokens", options.low_latency_tokens, "Tokens of a rank, low latency");
  command.add_option("--hidden", options.payload.hidden, "Values of a row");
  command.add_option("--topk", options.gate.topk, "Experts of a token");
  command.add_option("--experts", options.gate.experts,
                     "Experts of all ranks; as many as ranks where there are more of these");
  command.add_option("--dtype", options.dtype, "Of dispatch: bf16, fp16, fp32, fp8 (with scales)");
  command.add_option("--routing", options.routing,
                     "uniform, limited (with --max-nodes), zipf (drawn with --skew as exponent) or "
                     "file");
  command.add_option("--max-nodes", options.gate.max_nodes, "Nodes that a token may go to");
  command.add_option("--routing-file", options.routing_file,
                     "Recorded top-k ids, as for deepep bench");
  command.add_option("--skew", options.gate.skew,
                     "Times the mean that the most popular rank is chosen; zipf: its exponent");
  command.add_option("--seed", options.seed, "Of zipf");
}

void add_machine_options(CLI::App& command, Options& options) {
  Machine& machine = options.machine;
  command.add_option("--local-gbps", machine.local_gbps, "Inside a node, a rank, one way");
  command.add_option("--local-us", machine.local_us, "One exchange of flags inside a node");
  command.add_option("--network-gbps", machine.network_gbps, "Between nodes, a rank, one way");
  command.add_option("--network-us", machine.network_us, "One exchange over the network");
  command.add_option("--network-mrate", machine.network_mrate, "Million messages a second, a rank");
  command.add_option("--call-us", machine.call_us, "A call in which nothing moves, on one rank");
  command.add_option("--write-gbps", machine.write_gbps, "Rows that a rank's processors write");
  command.add_option("--sum-gbps", machine.sum_gbps, "Rows that they read and sum");
  command.add_option("--ll-call-us", machine.low_latency_call_us, "--call-us of low latency");
  command.add_option("--ll-write-gbps", machine.low_latency_write_gbps, "The same, low latency");
  command.add_option("--ll-sum-gbps", machine.low_latency_sum_gbps, "The same, low latency");
  command.add_option("--chunk-rows", machine.chunk_rows,
                     "Rows of a message over the network, high throughput");
}

}  // namespace

void add_plan(CLI::App& app, int& status) {
  CLI::App* command =
      app.add_subcommand("plan", "What calls would take on other machines, predicted");
  const auto options = std::make_shared<Options>();
  command->option_defaults()->always_capture_default();
  add_gate_options(*command, *options);
  add_machine_options(*command, *options);
  command->add_option("--json", options->json, "File for the results");
  command->footer("The model and how far it is from what was measured: docs/scaling.md.");
  command->callback([options, &status] {
    run_plan(*options);
    status = 0;
  });
}

}  // namespace deep_ep::cli
