#include "bench_rows.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "stats.hpp"

namespace deep_ep::cli {
namespace {

nlohmann::json encode(const std::vector<BenchRow>& rows) {
  nlohmann::json json = nlohmann::json::array();
  for (const BenchRow& row : rows)
    json.push_back({row.times_us, row.logical_bytes, row.wire_bytes, row.checked_elements,
                    row.wrong_elements, row.first_mismatch, row.host_us, row.node_bytes});
  return json;
}

}  // namespace

std::vector<BenchRow> merge_rows(Bootstrap& bootstrap, std::vector<BenchRow> rows) {
  const auto parts = bootstrap.all_gather(encode(rows).dump());
  std::vector<nlohmann::json> ranks;
  for (const std::string& part : parts) ranks.push_back(nlohmann::json::parse(part));
  const auto count = static_cast<double>(ranks.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    BenchRow sum{rows[i].operation};
    std::vector<std::vector<double>> times;
    std::vector<std::vector<double>> host_times;
    for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
      const auto& part = ranks[rank].at(i);
      times.push_back(part.at(0));
      host_times.push_back(part.at(6));
      sum.logical_bytes += part.at(1).get<double>() / count;
      sum.wire_bytes += part.at(2).get<double>() / count;
      sum.node_bytes += part.at(7).get<double>() / count;
      sum.checked_elements += part.at(3).get<std::int64_t>();
      sum.wrong_elements += part.at(4).get<std::int64_t>();
      const auto mismatch = part.at(5).get<std::string>();
      if (sum.first_mismatch.empty() && !mismatch.empty())
        sum.first_mismatch = fmt::format("rank {}: {}", rank, mismatch);
    }
    sum.times_us = slowest(times);
    sum.host_us = slowest(host_times);
    rows[i] = std::move(sum);
  }
  return rows;
}

}  // namespace deep_ep::cli
