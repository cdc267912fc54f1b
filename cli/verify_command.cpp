#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "commands.hpp"
#include "names.hpp"
#include "nodes.hpp"
#include "ranks.hpp"
#include "verify/case.hpp"
#include "verify/covering_set.hpp"
#include "verify_results.hpp"

namespace deep_ep::cli {
namespace {

using verify::Case;
using verify::CaseResult;

struct Options {
  int ranks = 0;
  std::optional<NodesAsked> nodes{};  // of `verify internode`
  std::string backend = "host";
  std::vector<std::int64_t> tokens{};
  std::optional<std::int64_t> hidden{};
  std::optional<int> topk{};
  std::optional<int> experts{};
  std::string dtype{};
  std::string routing{};
  std::uint64_t seed = 1;
  bool async = false;
  bool prepare = false;
  bool grouped = false;
  bool verbose = false;

  bool has_shape() const {
    return !tokens.empty() || hidden || topk || experts || !dtype.empty() || !routing.empty() ||
           async || prepare || grouped;
  }
};

Case shape_case(const Options& options, int ranks) {
  Case c;
  c.name = "the given shape";
  c.ranks = ranks;
  if (!options.tokens.empty()) c.tokens = options.tokens;
  c.hidden = options.hidden.value_or(c.hidden);
  c.topk = options.topk.value_or(c.topk);
  c.experts = options.experts.value_or(8 * ranks);
  if (!options.dtype.empty()) c.dtype = dtype_from(options.dtype);
  c.combine_dtype = combine_dtype_for(c.dtype);
  if (c.dtype == DType::kFloat8E4m3) c.scales = verify::Scales::kFloat32;
  if (!options.routing.empty()) c.routing = verify::routing_from(options.routing);
  c.async = options.async;
  c.prepare = options.prepare;
  if (options.prepare) c.outputs = verify::Outputs::kPrivate;
  if (options.grouped) c.groups = verify::Groups::kWeighted;
  c.seed = options.seed;
  return c;
}

int run_cases(std::shared_ptr<Bootstrap> bootstrap, std::vector<Case> cases,
              const Options& options) {
  if (options.nodes) (void)find_nodes(*bootstrap, *options.nodes);
  Buffer buffer(bootstrap, {.device = device_from(options.backend, bootstrap->rank())});
  int failed = 0;
  for (Case& c : cases) {
    // A launcher may have started ranks of several nodes whatever the command.
    if (buffer.num_nodes() > 1) c.ranks_per_node = buffer.num_ranks_per_node();
    const CaseResult result = gather_result(*bootstrap, verify::run_case(buffer, c));
    failed += result.passed() ? 0 : 1;
    if (bootstrap->rank() == 0) print_result(c.name, c.describe(), result, options.verbose);
  }
  if (bootstrap->rank() == 0)
    fmt::print("{} passed, {} failed on {} ranks\n",
               cases.size() - static_cast<std::size_t>(failed), failed, bootstrap->size());
  return failed == 0 ? 0 : 1;
}

int verify_cases(const Options& options, int ranks) {
  std::vector<Case> cases = options.has_shape() ? std::vector<Case>{shape_case(options, ranks)}
                                                : verify::covering_set(ranks, options.seed);
  for (const Case& c : cases) verify::validate(c);
  return run_ranks(ranks, [&](std::shared_ptr<Bootstrap> bootstrap) {
    return run_cases(std::move(bootstrap), cases, options);
  });
}

void add_shape_options(CLI::App& command, Options& options) {
  command.add_option("--backend", options.backend, kBackends)->default_str("host");
  command.add_option("--tokens", options.tokens, "Tokens of a rank, or a list with one for each")
      ->delimiter(',');
  command.add_option("--hidden", options.hidden, "Values of a row");
  command.add_option("--topk", options.topk, "Experts of a token");
  command.add_option("--experts", options.experts, "Experts of all ranks");
  command.add_option("--dtype", options.dtype, "bf16, fp16, fp32, fp8 or bytes");
  command.add_option("--routing", options.routing,
                     "uniform, zipf, grouped, all-to-all, to-rank-zero, to-self, none, holes or "
                     "duplicates");
  command.add_flag("--async", options.async, "Calls return at once and are chained by events");
  command.add_flag("--prepare", options.prepare,
                   "Counts first, then a dispatch to memory of the caller's");
  command.add_flag("--grouped", options.grouped, "Rows grouped by expert, there and back");
  command.add_option("--seed", options.seed, "Of routing and payload");
  command.add_flag("-v,--verbose", options.verbose, "Print each case's numbers");
}

void add_verify_internode(CLI::App& verify, int& status) {
  CLI::App* command = verify.add_subcommand("internode", "The same over several nodes");
  const auto options = std::make_shared<Options>();
  options->nodes.emplace();
  add_node_options(*command, *options->nodes);
  add_shape_options(*command, *options);
  command->footer("Without a shape (tokens to grouped) a covering set of cases runs.");
  command->callback(
      [options, &status] { status = verify_cases(*options, count_node_ranks(*options->nodes)); });
}

}  // namespace

void add_verify(CLI::App& app, int& status) {
  CLI::App* command = app.add_subcommand(
      "verify", "Layers on this machine, every output compared bitwise with the reference");
  const auto options = std::make_shared<Options>();
  command->add_option("--ranks", options->ranks, "Ranks, one process each")->default_str("4");
  add_shape_options(*command, *options);
  command->footer("Without a shape (tokens to grouped) a covering set of cases runs.");
  add_verify_internode(*command, status);
  add_verify_low_latency(*command, status);
  command->callback([command, options, &status] {
    if (command->get_subcommands().empty())
      status = verify_cases(*options, count_ranks(options->ranks, 4));
  });
}

}  // namespace deep_ep::cli
