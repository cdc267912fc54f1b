#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "commands.hpp"
#include "names.hpp"
#include "nodes.hpp"
#include "ranks.hpp"
#include "verify/low_latency_case.hpp"
#include "verify_results.hpp"

namespace deep_ep::cli {
namespace {

using verify::Hooks;
using verify::LowLatencyCase;
using verify::LowLatencyPayload;
using verify::Routing;

struct Options {
  int ranks = 0;
  NodesAsked nodes{};
  std::string backend = "host";
  LowLatencyCase c{};
  std::string payload = "fp8";
  std::string wire = "bf16";
  std::string hooks = "none";
  std::string routing = "uniform";
  int experts = 0;
  bool verbose = false;
};

LowLatencyCase given_case(const Options& options, int ranks) {
  LowLatencyCase c = options.c;
  c.name = "the given shape";
  c.ranks = ranks;
  c.payload = verify::low_latency_payload_from(options.payload);
  c.wire = verify::wire_from(options.wire);
  c.hooks = verify::hooks_from(options.hooks);
  c.routing = verify::routing_from(options.routing);
  c.experts = options.experts > 0 ? options.experts : 8 * ranks;
  return c;
}

/// Every payload, both formats, all wires and orders of hooks; neighbours differ in shape.
std::vector<LowLatencyCase> covering_cases(const Options& options, int ranks) {
  const Hooks hooks[] = {Hooks::kNone,        Hooks::kEach,      Hooks::kTwoInOrder,
                         Hooks::kTwoReversed, Hooks::kTwoByRank, Hooks::kCrossed};
  const Routing routings[] = {Routing::kUniform, Routing::kDuplicates, Routing::kHoles,
                              Routing::kZipf};
  std::vector<LowLatencyCase> cases;
  for (int payload = 0; payload <= static_cast<int>(LowLatencyPayload::kScaledPacked); ++payload) {
    for (const bool rank_major : {false, true}) {
      const std::size_t i = cases.size();
      LowLatencyCase c;
      c.ranks = ranks;
      c.experts = 8 * ranks;
      c.payload = static_cast<LowLatencyPayload>(payload);
      c.rank_major = rank_major;
      c.wire = static_cast<plan::WireFormat>(payload % 3);
      c.hooks = hooks[i % std::size(hooks)];
      c.routing = routings[i % std::size(routings)];
      c.hidden = i % 3 == 0 ? 2048 : 256;
      c.tokens = {i % 4 == 3 ? 1 : 24};
      c.max_tokens = i % 2 == 0 ? 32 : 24;
      c.topk = i % 5 == 4 ? 12 : 6;
      c.zero_copy = i % 3 == 1;
      c.own_outputs = i % 3 == 2;
      c.clone_handle = i % 2 == 1;
      c.stats = true;
      c.dispatches = 4;
      c.combines = 5;
      c.seed = options.c.seed + i;
      c.name = fmt::format("{}, {}, home in {}, hooks {}", verify::to_string(c.payload),
                           rank_major ? "rank-major" : "expert-major", verify::to_string(c.wire),
                           verify::to_string(c.hooks));
      cases.push_back(c);
    }
  }
  return cases;
}

int run_cases(const std::shared_ptr<Bootstrap>& bootstrap, std::vector<LowLatencyCase> cases,
              const Options& options) {
  const int ranks_per_node = find_ranks_per_node(*bootstrap, options.nodes);
  for (LowLatencyCase& c : cases) c.ranks_per_node = ranks_per_node;
  BufferOptions buffer_options;
  buffer_options.device = device_from(options.backend, bootstrap->rank());
  buffer_options.low_latency_mode = true;
  for (const LowLatencyCase& c : cases)
    buffer_options.num_rdma_bytes = std::max(buffer_options.num_rdma_bytes, c.buffer_bytes());
  Buffer buffer(bootstrap, buffer_options);
  std::size_t failed = 0;
  for (const LowLatencyCase& c : cases) {
    const verify::CaseResult result = gather_result(*bootstrap, verify::run_case(buffer, c));
    failed += result.passed() ? 0 : 1;
    if (bootstrap->rank() == 0) print_result(c.name, c.describe(), result, options.verbose);
  }
  if (bootstrap->rank() == 0)
    fmt::print("{} passed, {} failed on {} ranks\n", cases.size() - failed, failed,
               bootstrap->size());
  return failed == 0 ? 0 : 1;
}

void add_shape_options(CLI::App& command, Options& options) {
  LowLatencyCase& c = options.c;
  command.add_option("--tokens", c.tokens, "Tokens of a rank, or a list with one for each")
      ->delimiter(',');
  command.add_option("--max-tokens", c.max_tokens, "Capacity; default: the most tokens of a rank");
  command.add_option("--hidden", c.hidden, "Values of a row");
  command.add_option("--topk", c.topk, "Experts of a token");
  command.add_option("--experts", options.experts, "Experts of all ranks");
  command.add_option("--payload", options.payload,
                     "bf16, fp8, fp8-rounded, fp8-ue8m0, fp16, fp32, bytes, scaled-fp8 or "
                     "scaled-packed");
  command.add_option("--wire", options.wire, "How rows come home: bf16, logfmt or fp8");
  command.add_option("--routing", options.routing, "As above");
  command.add_option("--hooks", options.hooks,
                     "none, each, two-in-order, two-reversed, two-by-rank or crossed");
  command.add_option("--dispatches", c.dispatches, "How many");
  command.add_option("--combines", c.combines, "How many, of the dispatches in turn");
  command.add_flag("--rank-major", c.rank_major, "Rows in (source rank, token) order");
  command.add_flag("--async", c.async, "Calls return at once and are chained by events");
  command.add_flag("--zero-copy", c.zero_copy, "Combine reads the Buffer's own memory");
}

}  // namespace

void add_verify_low_latency(CLI::App& verify, int& status) {
  CLI::App* command = verify.add_subcommand(
      "low-latency", "The same for low latency, without a shape for a covering set");
  const auto options = std::make_shared<Options>();
  command->add_option("--ranks", options->ranks, "Ranks, one process each")->default_str("4");
  add_node_options(*command, options->nodes, true);
  command->add_option("--backend", options->backend, kBackends)->default_str("host");
  command->add_option("--seed", options->c.seed, "Of routing and payload");
  command->add_flag("-v,--verbose", options->verbose, "Print each case's numbers");
  CLI::App* shape = command->add_option_group("shape");
  add_shape_options(*shape, *options);
  command->callback([shape, options, &status] {
    const int ranks = count_ranks(options->ranks, 4, options->nodes);
    const std::vector<LowLatencyCase> cases =
        shape->count_all() > 0 ? std::vector<LowLatencyCase>{given_case(*options, ranks)}
                               : covering_cases(*options, ranks);
    for (const LowLatencyCase& c : cases) verify::validate(c);
    status = run_ranks(ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
      return run_cases(bootstrap, cases, *options);
    });
  });
}

}  // namespace deep_ep::cli
