#include "stats.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace deep_ep::cli {

Summary summarize(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const std::size_t count = values.size();
  const auto p99_rank = static_cast<std::size_t>(std::ceil(0.99 * static_cast<double>(count)));
  Summary summary;
  summary.median = (values[(count - 1) / 2] + values[count / 2]) / 2;
  summary.p99 = values[p99_rank - 1];
  summary.min = values.front();
  summary.max = values.back();
  return summary;
}

std::vector<double> slowest(const std::vector<std::vector<double>>& ranks) {
  std::vector<double> times = ranks.empty() ? std::vector<double>() : ranks.front();
  for (const auto& rank : ranks)
    for (std::size_t i = 0; i < times.size(); ++i) times[i] = std::max(times[i], rank.at(i));
  return times;
}

}  // namespace deep_ep::cli
