#include "contract/program.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "contract/covering.hpp"

namespace deep_ep::test {
namespace {

using verify::Case;
using verify::Routing;
using verify::Scales;

/// Ranks, and ranks of a node.
struct Nodes {
  int ranks;
  int ranks_per_node;
};
constexpr std::array kOneNode{Nodes{1, 0}, Nodes{2, 0}, Nodes{3, 0},
                              Nodes{4, 0}, Nodes{5, 0}, Nodes{8, 0}};
constexpr std::array kSeveralNodes{Nodes{2, 1}, Nodes{4, 2}, Nodes{4, 1},
                                   Nodes{8, 4}, Nodes{8, 2}, Nodes{6, 2}};
static_assert(kOneNode.size() == kSeveralNodes.size());
constexpr std::array kTopk{1, 2, 6, 8, 9, 16, 32};
constexpr std::array kTokens{0, 1, 7, 128, 4096};
constexpr std::array kDtypes{DType::kBfloat16, DType::kFloat16, DType::kFloat32, DType::kFloat8E4m3,
                             DType::kUint8};
constexpr std::array kSumDtypes{DType::kBfloat16, DType::kFloat16, DType::kFloat32};
constexpr std::array kScales{Scales::kNone, Scales::kFloat32, Scales::kFloat32ColumnMajor,
                             Scales::kPacked, Scales::kPackedColumnMajor};
constexpr std::array kRoutings{Routing::kUniform,  Routing::kZipf,       Routing::kGrouped,
                               Routing::kAllToAll, Routing::kToRankZero, Routing::kToSelf,
                               Routing::kNone,     Routing::kHoles,      Routing::kDuplicates};
constexpr std::array kNumScales{0, 1, 3};
constexpr std::array kLocalExperts{1, 3, 32};
constexpr std::array kAlignments{1, 8, 128};
// Values a row; 0 stands for the shortest row, 16 bytes.
constexpr std::array kHidden{0, 24, 512, 7168, 8192, 16384};
constexpr int kHiddenLevels = static_cast<int>(kHidden.size());

enum Factor {
  kRanksFactor,
  kTopkFactor,
  kTokensFactor,
  kSpreadFactor,
  kHiddenFactor,
  kDtypeFactor,
  kSumDtypeFactor,
  kScalesFactor,
  kNumScalesFactor,
  kRoutingFactor,
  kLocalExpertsFactor,
  kArgumentsFactor,
  kAlignmentFactor,
  kBiasFactor,
  kReuseFactor,
  kOrderFactor,
  kConfigFactor,
  kLateConfigFactor,
  kIdFactor,
  kOutputsFactor,
  kGroupsFactor,
  kPrepareFactor,
  kNumFactors
};

std::vector<int> factor_levels() {
  std::vector<int> levels(kNumFactors);
  levels[kRanksFactor] = kOneNode.size();
  levels[kTopkFactor] = kTopk.size();
  levels[kTokensFactor] = kTokens.size();
  levels[kSpreadFactor] = kSpreads;
  levels[kHiddenFactor] = kHiddenLevels;
  levels[kDtypeFactor] = kDtypes.size();
  levels[kSumDtypeFactor] = kSumDtypes.size();
  levels[kScalesFactor] = kScales.size();
  levels[kNumScalesFactor] = kNumScales.size();
  levels[kRoutingFactor] = kRoutings.size();
  levels[kLocalExpertsFactor] = kLocalExperts.size();
  levels[kArgumentsFactor] = 5;
  levels[kAlignmentFactor] = kAlignments.size();
  levels[kBiasFactor] = 3;
  levels[kReuseFactor] = 4;
  levels[kOrderFactor] = 4;
  levels[kConfigFactor] = 3;
  levels[kLateConfigFactor] = 3;
  levels[kIdFactor] = 2;
  levels[kOutputsFactor] = 4;
  levels[kGroupsFactor] = 3;
  levels[kPrepareFactor] = 2;
  return levels;
}

/// Rows are multiples of 16 bytes in every dtype that the exchange uses: 16 values are, in all.
std::int64_t hidden_of(int level, DType dtype, DType sum_dtype) {
  const std::int64_t hidden = kHidden[static_cast<std::size_t>(level)];
  const auto smallest =
      static_cast<std::int64_t>(16 / std::min(size_of(dtype), size_of(sum_dtype)));
  return hidden == 0 ? smallest : (hidden + smallest - 1) / smallest * smallest;
}

Config config_of(int level) {
  Config config;
  if (level == 1) {
    config.num_sms = 1;
    config.num_max_nvl_chunked_send_tokens = 1;
    config.num_max_nvl_chunked_recv_tokens = 1;
    config.num_max_rdma_chunked_send_tokens = 1;
    config.num_max_rdma_chunked_recv_tokens = 1;
  }
  if (level == 2) {
    config.num_sms = 64;
    config.num_max_nvl_chunked_send_tokens = 32;
    config.num_max_nvl_chunked_recv_tokens = 33;
    config.num_max_rdma_chunked_send_tokens = 16;
    config.num_max_rdma_chunked_recv_tokens = 20;
  }
  return config;
}

void set_arguments(Case& c, int level) {
  c.pass_topk = level != 1;
  c.weights = level != 2;
  if (level == 3) c.num_worst_tokens = Case::kWorstFits;
  if (level == 4) {
    c.num_worst_tokens = 3;
    for (std::int64_t tokens : c.tokens) c.num_worst_tokens += tokens;
  }
}

Case case_of(const std::vector<int>& row, std::uint64_t seed, bool several_nodes) {
  Case c;
  c.seed = seed;
  const Nodes nodes =
      (several_nodes ? kSeveralNodes : kOneNode)[static_cast<std::size_t>(row[kRanksFactor])];
  c.ranks = nodes.ranks;
  c.ranks_per_node = nodes.ranks_per_node;
  c.topk = kTopk[static_cast<std::size_t>(row[kTopkFactor])];
  const int local = kLocalExperts[static_cast<std::size_t>(row[kLocalExpertsFactor])];
  c.experts = c.ranks * std::max(local, (c.topk + c.ranks - 1) / c.ranks);
  c.tokens = spread_tokens(kTokens[static_cast<std::size_t>(row[kTokensFactor])], c.ranks,
                           row[kSpreadFactor]);
  c.dtype = kDtypes[static_cast<std::size_t>(row[kDtypeFactor])];
  c.combine_dtype = kSumDtypes[static_cast<std::size_t>(row[kSumDtypeFactor])];
  c.hidden = hidden_of(row[kHiddenFactor], c.dtype, c.combine_dtype);
  c.scales = kScales[static_cast<std::size_t>(row[kScalesFactor])];
  c.num_scales =
      c.scales == Scales::kNone ? 0 : kNumScales[static_cast<std::size_t>(row[kNumScalesFactor])];
  c.routing = kRoutings[static_cast<std::size_t>(row[kRoutingFactor])];
  c.topk_dtype = row[kIdFactor] == 0 ? DType::kInt64 : DType::kInt32;
  set_arguments(c, row[kArgumentsFactor]);
  c.outputs = static_cast<verify::Outputs>(row[kOutputsFactor]);
  if (c.pass_topk) c.groups = static_cast<verify::Groups>(row[kGroupsFactor]);
  if (c.groups == verify::Groups::kWeighted && !c.weights) c.groups = verify::Groups::kUnweighted;
  c.prepare = row[kPrepareFactor] == 1 && c.num_worst_tokens == 0;
  c.expert_alignment = kAlignments[static_cast<std::size_t>(row[kAlignmentFactor])];
  c.biases = row[kBiasFactor];
  constexpr std::array kCached{0, 1, 3, 2};
  constexpr std::array kCombines{1, 2, 1, 3};
  c.cached_repeats = kCached[static_cast<std::size_t>(row[kReuseFactor])];
  c.combines = kCombines[static_cast<std::size_t>(row[kReuseFactor])];
  c.clone_handle = row[kReuseFactor] >= 2;
  c.async = row[kOrderFactor] % 2 == 1;
  c.hold_results = row[kOrderFactor] >= 2;
  c.config = config_of(row[kConfigFactor]);
  c.late_config = config_of(row[kLateConfigFactor]);
  return c;
}

}  // namespace

std::string Program::summary() const {
  return fmt::format("{}: {} ranks, {} steps{}{}", name, ranks, steps.size(),
                     concurrent ? ", concurrent" : "", own_buffers ? ", own buffers" : "");
}

std::string Program::describe() const {
  std::string text = summary();
  for (const Step& step : steps)
    text += fmt::format("\n    buffer {}: {}", step.buffer, step.describe());
  return text;
}

std::int64_t estimate_bytes(const Case& c) {
  std::int64_t tokens = 0;
  for (int rank = 0; rank < c.ranks; ++rank) tokens += c.tokens_of(rank);
  const std::int64_t received =
      tokens * std::min(c.ranks, c.topk) + std::max<std::int64_t>(c.num_worst_tokens, 0) * c.ranks;
  const auto row = c.hidden * static_cast<std::int64_t>(size_of(c.dtype));
  const auto sum_row = c.hidden * static_cast<std::int64_t>(size_of(c.combine_dtype));
  // Every row once more for each of its experts, padded.
  std::int64_t grouped = 0;
  if (c.groups != verify::Groups::kNone) {
    const std::int64_t most = c.num_worst_tokens != 0 ? tokens * c.ranks * c.topk : tokens * c.topk;
    grouped = most + std::min<std::int64_t>(most, c.experts) * (c.expert_alignment - 1);
  }
  // An input and an output of a dispatch; rows, biases and sums of a combine; the check holds as
  // much again.
  const std::int64_t copies = c.outputs == verify::Outputs::kLibrary ? 1 : 2;
  const std::int64_t dispatch = (tokens + received + grouped) * (row + 12 * c.topk + 64) * copies;
  const std::int64_t combine =
      (received + grouped + (2 + c.biases) * tokens) * (sum_row + 4 * c.topk);
  const std::int64_t live = c.hold_results
                                ? dispatch * (1 + c.cached_repeats) + combine * c.combines
                                : dispatch + combine;
  return live + 2 * (dispatch + combine);
}

void fit(Case& c, std::int64_t bytes) {
  while (estimate_bytes(c) > bytes) {
    std::int64_t total = 0;
    const bool larger_worst = c.num_worst_tokens > 0;
    for (std::int64_t& tokens : c.tokens) {
      tokens = tokens * 2 / 3;
      total += tokens;
    }
    if (larger_worst) c.num_worst_tokens = total + 3;
    if (total == 0) return;
  }
}

std::vector<Program> covering_programs(std::uint64_t seed, const Limits& limits,
                                       bool several_nodes) {
  std::vector<Program> programs;
  for (const std::vector<int>& row : pairwise_rows(factor_levels(), seed)) {
    Program program;
    Case c = case_of(row, seed * 1000 + programs.size(), several_nodes);
    if (c.ranks > limits.max_ranks) continue;
    fit(c, limits.bytes);
    program.name = fmt::format("pairwise/{}", programs.size());
    program.ranks = c.ranks;
    program.ranks_per_node = c.ranks_per_node;
    program.steps.push_back({static_cast<int>(programs.size() % 2), c});
    programs.push_back(std::move(program));
  }
  return programs;
}

Program random_program(std::uint64_t seed, const Limits& limits, bool several_nodes) {
  std::mt19937_64 random(seed);
  Program program;
  program.name = fmt::format("random/{}", seed);
  const std::vector<int> levels = factor_levels();
  const auto level = [&](int factor) {
    return static_cast<int>(random() % static_cast<std::uint64_t>(levels[factor]));
  };
  int ranks_level = 0;
  do {
    ranks_level = level(kRanksFactor);
    program.ranks =
        (several_nodes ? kSeveralNodes : kOneNode)[static_cast<std::size_t>(ranks_level)].ranks;
  } while (program.ranks > limits.max_ranks);
  const int num_buffers = random() % 4 == 0 ? 2 : 1;
  program.concurrent = num_buffers == 2 && random() % 2 == 0;
  program.own_buffers = random() % 16 == 0;
  const int num_steps = 1 + static_cast<int>(random() % 5);
  for (int i = 0; i < num_steps; ++i) {
    std::vector<int> row(kNumFactors);
    for (int factor = 0; factor < kNumFactors; ++factor)
      row[static_cast<std::size_t>(factor)] = level(factor);
    row[kRanksFactor] = ranks_level;
    Case c = case_of(row, random(), several_nodes);
    program.ranks_per_node = c.ranks_per_node;
    // Beside the levels, any number: most tokens, hidden sizes and top-ks are no round number.
    if (random() % 2 == 0) {
      c.num_worst_tokens = std::min<std::int64_t>(c.num_worst_tokens, 0);
      for (std::int64_t& tokens : c.tokens) tokens = static_cast<std::int64_t>(random() % 300);
      c.hidden = 16 * static_cast<std::int64_t>(1 + random() % 128);
      c.topk = 1 + static_cast<int>(random() % static_cast<std::uint64_t>(std::min(c.experts, 40)));
      c.expert_alignment = 1 + static_cast<int>(random() % 200);
    }
    fit(c, limits.bytes / num_steps);
    program.steps.push_back({i % num_buffers, std::move(c)});
  }
  return program;
}

}  // namespace deep_ep::test
