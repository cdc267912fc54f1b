#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <random>

#include "contract/covering.hpp"
#include "contract/program.hpp"

// Programs of low latency: the covering array and random ones. The corners have a file of their
// own.
namespace deep_ep::test {
namespace {

using verify::Hooks;
using verify::LowLatencyCase;
using verify::LowLatencyPayload;
using verify::Routing;

constexpr std::array kRanks{1, 2, 3, 4, 5, 8};
constexpr std::array kTopk{1, 2, 6, 8, 9, 16, 32};
constexpr std::array kTokens{0, 1, 7, 33, 128};
// Values a row; what payload or dtype does not allow is rounded up.
constexpr std::array kHidden{8, 256, 640, 2048, 7168, 16384};
constexpr std::array kLocalExperts{1, 3, 32};
constexpr std::array kRoutings{Routing::kUniform,  Routing::kZipf,       Routing::kGrouped,
                               Routing::kAllToAll, Routing::kToRankZero, Routing::kToSelf,
                               Routing::kNone,     Routing::kHoles,      Routing::kDuplicates};
constexpr int kPayloads = 9;
constexpr int kHookLevels = 6;

enum Factor {
  kRanksFactor,
  kTopkFactor,
  kTokensFactor,
  kSpreadFactor,
  kCapacityFactor,
  kHiddenFactor,
  kPayloadFactor,
  kRoutingFactor,
  kLocalExpertsFactor,
  kFormatFactor,
  kWireFactor,
  kHooksFactor,
  kIdFactor,
  kReuseFactor,
  kOutputsFactor,
  kNumFactors
};

std::vector<int> factor_levels() {
  std::vector<int> levels(kNumFactors);
  levels[kRanksFactor] = kRanks.size();
  levels[kTopkFactor] = kTopk.size();
  levels[kTokensFactor] = kTokens.size();
  levels[kSpreadFactor] = kSpreads;
  levels[kCapacityFactor] = 3;
  levels[kHiddenFactor] = kHidden.size();
  levels[kPayloadFactor] = kPayloads;
  levels[kRoutingFactor] = kRoutings.size();
  levels[kLocalExpertsFactor] = kLocalExperts.size();
  levels[kFormatFactor] = 3;
  levels[kWireFactor] = 3;
  levels[kHooksFactor] = kHookLevels + 1;  // the last: async
  levels[kIdFactor] = 2;
  levels[kReuseFactor] = 4;
  levels[kOutputsFactor] = 4;
  return levels;
}

bool quantised(LowLatencyPayload payload) {
  return payload == LowLatencyPayload::kFp8 || payload == LowLatencyPayload::kFp8Rounded ||
         payload == LowLatencyPayload::kFp8Ue8m0;
}

/// Rows of bfloat16 and of the payload must be multiples of 16 bytes, quantised ones of 128 values.
std::int64_t rounded_hidden(std::int64_t hidden, const LowLatencyCase& c) {
  std::int64_t unit = 16;
  if (c.payload == LowLatencyPayload::kBfloat16 || c.payload == LowLatencyPayload::kFloat16 ||
      c.payload == LowLatencyPayload::kFloat32)
    unit = 8;
  if (quantised(c.payload) || c.wire != plan::WireFormat::kBfloat16) unit = 128;
  return (hidden + unit - 1) / unit * unit;
}

LowLatencyCase case_of(const std::vector<int>& row, std::uint64_t seed) {
  const auto at = [&row](int factor) { return static_cast<std::size_t>(row[factor]); };
  LowLatencyCase c;
  c.seed = seed;
  c.ranks = kRanks[at(kRanksFactor)];
  c.topk = kTopk[at(kTopkFactor)];
  c.experts =
      c.ranks * std::max(kLocalExperts[at(kLocalExpertsFactor)], (c.topk + c.ranks - 1) / c.ranks);
  const std::int64_t tokens = kTokens[at(kTokensFactor)];
  c.tokens = spread_tokens(tokens, c.ranks, row[kSpreadFactor]);
  const std::array<std::int64_t, 3> capacities{0, std::max<std::int64_t>(tokens, 1) + 3, 256};
  c.max_tokens = capacities[at(kCapacityFactor)];
  c.payload = static_cast<LowLatencyPayload>(row[kPayloadFactor]);
  c.wire = static_cast<plan::WireFormat>(row[kWireFactor]);
  c.hidden = rounded_hidden(kHidden[at(kHiddenFactor)], c);
  c.routing = kRoutings[at(kRoutingFactor)];
  c.rank_major = row[kFormatFactor] > 0;
  c.weights = row[kFormatFactor] != 2;
  c.async = row[kHooksFactor] == kHookLevels;
  c.hooks = c.async ? Hooks::kNone : static_cast<Hooks>(row[kHooksFactor]);
  c.topk_dtype = row[kIdFactor] == 0 ? DType::kInt64 : DType::kInt32;
  constexpr std::array kDispatches{1, 2, 3, 4};
  constexpr std::array kCombines{1, 2, 5, 3};
  c.dispatches = kDispatches[at(kReuseFactor)];
  c.combines = kCombines[at(kReuseFactor)];
  c.clone_handle = row[kReuseFactor] % 2 == 1;
  c.stats = row[kOutputsFactor] % 2 == 1;
  c.own_outputs = row[kOutputsFactor] >= 2;
  c.zero_copy = row[kOutputsFactor] == 1 || row[kOutputsFactor] == 2;
  return c;
}

void append(std::vector<Program>& programs, Program program, const LowLatencyCase& c, int buffer) {
  program.ranks = c.ranks;
  Step step;
  step.buffer = buffer;
  step.low_latency = c;
  program.steps.push_back(std::move(step));
  programs.push_back(std::move(program));
}

/// Over nodes of one of the sizes that are possible.
void spread(Program& program, std::uint64_t choice) {
  std::vector<int> sizes;
  for (int size = 1; size < program.ranks; ++size)
    if (program.ranks % size == 0) sizes.push_back(size);
  program.ranks_per_node = sizes[choice % sizes.size()];
  for (Step& step : program.steps) step.low_latency->ranks_per_node = program.ranks_per_node;
}

}  // namespace

std::int64_t estimate_bytes(const LowLatencyCase& c) {
  std::int64_t tokens = 0;
  for (int rank = 0; rank < c.ranks; ++rank) tokens += c.tokens_of(rank);
  const std::int64_t values = c.hidden + 16;
  // Results are as large as their capacity, but on hosts only what is written takes memory.
  const std::int64_t groups = c.rank_major ? 1 : c.experts / c.ranks;
  const std::int64_t rows = groups * c.ranks * c.capacity() * c.ranks;
  const std::int64_t row = rows * (values + 8 + (c.rank_major ? 16 * c.topk : 0));
  const std::int64_t combine = rows * values * 2;
  const std::int64_t copies = c.own_outputs ? 2 : 1;
  return c.buffer_bytes() * c.ranks + row * c.dispatches * copies +
         combine * std::min(c.combines, 4) + tokens * values * 16;
}

void fit(LowLatencyCase& c, std::int64_t bytes) {
  while (estimate_bytes(c) > bytes) {
    const std::int64_t capacity = c.capacity() * 2 / 3;
    if (capacity < 1) return;
    c.max_tokens = c.max_tokens > 0 ? capacity : 0;
    for (std::int64_t& tokens : c.tokens) tokens = std::min(tokens, capacity);
  }
}

std::vector<Program> low_latency_covering_programs(std::uint64_t seed, const Limits& limits) {
  std::vector<Program> programs;
  for (const std::vector<int>& row : pairwise_rows(factor_levels(), seed)) {
    LowLatencyCase c = case_of(row, seed * 1000 + programs.size());
    if (c.ranks > limits.max_ranks) continue;
    fit(c, limits.bytes);
    Program program;
    program.name = fmt::format("pairwise/{}", programs.size());
    append(programs, std::move(program), c, static_cast<int>(programs.size() % 2));
  }
  return programs;
}

Program random_low_latency_program(std::uint64_t seed, const Limits& limits, bool several_nodes) {
  std::mt19937_64 random(seed);
  const std::vector<int> levels = factor_levels();
  const auto below = [&random](int bound) {
    return static_cast<int>(random() % static_cast<std::uint64_t>(bound));
  };
  Program program;
  program.name = fmt::format("random/{}", seed);
  int ranks_level = 0;
  do {
    ranks_level = below(levels[kRanksFactor]);
    program.ranks = kRanks[static_cast<std::size_t>(ranks_level)];
  } while (program.ranks > limits.max_ranks || (several_nodes && program.ranks == 1));
  const int num_buffers = random() % 4 == 0 ? 2 : 1;
  program.concurrent = num_buffers == 2 && random() % 2 == 0;
  const int num_steps = 1 + below(5);
  for (int i = 0; i < num_steps; ++i) {
    std::vector<int> row(kNumFactors);
    for (int factor = 0; factor < kNumFactors; ++factor)
      row[static_cast<std::size_t>(factor)] = below(levels[factor]);
    row[kRanksFactor] = ranks_level;
    LowLatencyCase c = case_of(row, random());
    // Beside the levels, any number.
    if (random() % 2 == 0) {
      c.max_tokens = 1 + below(150);
      for (std::int64_t& tokens : c.tokens) tokens = below(static_cast<int>(c.max_tokens) + 1);
      c.hidden = rounded_hidden(16 * (1 + below(128)), c);
      c.topk = 1 + below(std::min(c.experts, 40));
    }
    fit(c, limits.bytes / num_steps);
    Step step;
    step.buffer = i % num_buffers;
    step.low_latency = c;
    program.steps.push_back(std::move(step));
  }
  if (several_nodes) spread(program, random());
  return program;
}

/// Nodes as large and as small as can be, in turn; six ranks are tried in all three ways.
std::vector<Program> spread_over_nodes(std::vector<Program> programs) {
  std::erase_if(programs, [](const Program& program) { return program.ranks < 2; });
  const std::size_t count = programs.size();
  for (std::size_t i = 0; i < count; ++i) {
    spread(programs[i], i);
    for (std::uint64_t more = 1; programs[i].ranks == 6 && more < 3; ++more) {
      Program program = programs[i];
      spread(program, i + more);
      program.name += fmt::format("/nodes_of_{}", program.ranks_per_node);
      programs.push_back(std::move(program));
    }
  }
  return programs;
}

}  // namespace deep_ep::test
