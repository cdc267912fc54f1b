#include "report.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

namespace moe {
namespace {

constexpr std::size_t kBarWidth = 40;

/// 1234567 as 1,234,567.
std::string grouped(std::int64_t number) {
  std::string digits = std::to_string(number);
  for (auto at = static_cast<std::ptrdiff_t>(digits.size()) - 3; at > 0; at -= 3)
    digits.insert(static_cast<std::size_t>(at), ",");
  return digits;
}

double percent(std::int64_t part, std::int64_t whole) {
  return whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

double megabytes(std::int64_t bytes) { return static_cast<double>(bytes) * 1e-6; }

}  // namespace

void print_run(const Run& run) {
  const std::int64_t total = std::accumulate(run.tokens.begin(), run.tokens.end(), std::int64_t{0});
  std::vector<std::string> shares;
  for (const std::int64_t tokens : run.tokens) shares.push_back(grouped(tokens));
  const ModelShape& shape = run.shape;
  fmt::print("text    {}: {} bytes, each a token\n", run.text_name, grouped(total));
  fmt::print(
      "model   {} layers of {} experts, {} for each token; {} values a token in BF16, {} inside an "
      "expert\n",
      shape.layers, shape.experts, shape.topk, shape.hidden, shape.intermediate);
  fmt::print("ranks   {}, each with {} experts of every layer; tokens of each: {}\n",
             run.tokens.size(), shape.experts / static_cast<int>(run.tokens.size()),
             fmt::join(shares, " "));
}

void print_load(const Run& run, const Account& total) {
  const std::size_t ranks = run.tokens.size();
  const std::size_t local_experts = total.load.size() / ranks;
  const std::int64_t all = std::accumulate(total.load.begin(), total.load.end(), std::int64_t{0});
  const std::int64_t largest = *std::max_element(total.load.begin(), total.load.end());
  fmt::print("\ntokens per expert, all layers\n");
  for (std::size_t e = 0; e < total.load.size(); ++e) {
    const std::size_t rank = e / local_experts;
    const auto first = total.load.begin() + static_cast<std::ptrdiff_t>(rank * local_experts);
    const bool heads_group = e % local_experts == 0;
    const auto bar = static_cast<std::size_t>(percent(total.load[e], largest) * kBarWidth / 100.0);
    fmt::print("  {:<9}expert {:>3}  {:<{}}  {:>9}",
               heads_group ? fmt::format("rank {}", rank) : "", e, std::string(bar, '#'), kBarWidth,
               grouped(total.load[e]));
    if (heads_group) {
      const auto last = first + static_cast<std::ptrdiff_t>(local_experts);
      fmt::print("   rank: {:.0f} %", percent(std::accumulate(first, last, std::int64_t{0}), all));
    }
    fmt::print("\n");
  }
}

void print_bytes(const Run& run, const Account& total) {
  const std::int64_t row_bytes = std::int64_t{2} * run.shape.hidden;
  const std::int64_t between = total.rows - total.rows_to_self;
  const std::int64_t pairs = std::accumulate(total.load.begin(), total.load.end(), std::int64_t{0});
  fmt::print("\n{:<12}{:>12}{:>16}{:>16}\n", "moved", "rows", "logical MB", "wire MB");
  for (const char* name : {"dispatch", "combine"})
    fmt::print("  {:<10}{:>12}{:>16.1f}{:>16.1f}\n", name, grouped(total.rows),
               megabytes(total.rows * row_bytes), megabytes(between * row_bytes));
  fmt::print("logical: all rows; wire: without the {} that stay on their own rank.\n",
             grouped(total.rows_to_self));
  fmt::print("One row for each (token, expert) would be {} rows, {:.1f} MB.\n", grouped(pairs),
             megabytes(pairs * row_bytes));
}

void print_times(const Account& slowest) {
  constexpr std::array<const char*, kNumPhases> kNames{"gate",    "layout",  "dispatch",
                                                       "experts", "combine", "waiting"};
  fmt::print("\ntime, slowest rank, all layers\n");
  for (std::size_t phase = 0; phase < kNames.size(); ++phase)
    fmt::print("  {:<10}{:>12.2f} ms\n", kNames[phase], slowest.seconds[phase] * 1e3);
}

void print_difference(int layer, const Difference& difference) {
  fmt::print(
      "  layer {}: {} values; largest difference {:.3g}, bound there {:.3g}; closest to its "
      "bound: {:.0f} %\n",
      layer, grouped(difference.values), difference.largest, difference.allowed,
      100.0f * difference.closest);
}

void print_verdict(std::int64_t values, std::int64_t outside, double seconds) {
  if (outside == 0)
    fmt::print("verified: {} values, each within its bound (one process took {:.1f} s)\n",
               grouped(values), seconds);
  else
    fmt::print("FAILED: {} of {} values are outside their bounds\n", grouped(outside),
               grouped(values));
}

}  // namespace moe
