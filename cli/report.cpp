#include "report.hpp"

#include <fmt/format.h>

#include <cstdio>

#include "deep_ep/version.hpp"
#include "machine.hpp"
#include "names.hpp"
#include "stats.hpp"

namespace deep_ep::cli {
namespace {

double gigabytes_per_second(double bytes, double us) { return us > 0 ? bytes / us / 1e3 : 0; }

/// What a row has of the rate of puts.
double share_of(const BenchRow& row, const PutRate& puts) {
  return gigabytes_per_second(row.node_bytes, summarize(row.times_us).median) * 1e9 /
         puts.bytes_per_second;
}

}  // namespace

void print_bench_header(const std::string& command, int ranks, const BenchSettings& settings,
                        const std::string& transport) {
  const Machine machine = read_machine();
  fmt::print("# deepep {} {} on {} ({}, {} cores), {}\n", version(), command, machine.host,
             machine.cpu, machine.cores, now());
  fmt::print("# {}\n", transport);
  fmt::print(
      "# ranks {}, routing {}, seed {}, warmup {}, iterations {} of {} calls, live results {}\n",
      ranks, settings.table ? "file" : verify::to_string(settings.routing), settings.seed,
      settings.warmup, settings.iterations, settings.chain, settings.live_results);
  fmt::print(
      "# time: of each iteration's slowest rank, behind a barrier; GB/s: received payload of "
      "a rank (mean) at the median time,\n# logical: all rows, wire: without its own rows; "
      "wrong: elements of the benchmarked results that differ from the reference\n");
  fmt::print(
      "#{:>8} {:>7} {:>5} {:>8} {:>6} {:>4}  {:<19} {:>11} {:>11} {:>11} {:>9} {:>9} {:>8}\n",
      "tokens", "hidden", "topk", "experts", "dtype", "sms", "operation", "median us", "p99 us",
      "min us", "logical", "wire", "wrong");
}

void print_bench_row(const BenchShape& shape, const BenchRow& row, const PutRates* puts) {
  const Summary times = summarize(row.times_us);
  fmt::print(
      " {:>8} {:>7} {:>5} {:>8} {:>6} {:>4}  {:<19} {:>11.1f} {:>11.1f} {:>11.1f} {:>9.2f} "
      "{:>9.2f} {:>8}{}\n",
      shape.tokens, shape.hidden, shape.topk, shape.experts, short_name(shape.dtype), shape.num_sms,
      row.operation, times.median, times.p99, times.min,
      gigabytes_per_second(row.logical_bytes, times.median),
      gigabytes_per_second(row.wire_bytes, times.median),
      row.checked_elements == 0 ? std::string("-") : std::to_string(row.wrong_elements),
      puts == nullptr || row.node_bytes == 0
          ? std::string()
          : fmt::format("  {:.3f} of puts by as many SMs, {:.3f} by {}",
                        share_of(row, puts->by_sms.at(shape.num_sms)), share_of(row, puts->all),
                        puts->all.num_sms));
  if (!row.first_mismatch.empty()) fmt::print("   first wrong: {}\n", row.first_mismatch);
  std::fflush(stdout);
}

void add_times(const BenchRow& row, nlohmann::ordered_json& json) {
  const Summary times = summarize(row.times_us);
  json["operation"] = row.operation;
  json["median_us"] = times.median;
  json["p99_us"] = times.p99;
  json["min_us"] = times.min;
  json["max_us"] = times.max;
  if (!row.host_us.empty()) json["host_us"] = summarize(row.host_us).median;
  json["logical_bytes_per_rank"] = row.logical_bytes;
  json["wire_bytes_per_rank"] = row.wire_bytes;
}

void add_checks(const BenchRow& row, nlohmann::ordered_json& json) {
  json["checked_elements"] = row.checked_elements;
  json["wrong_elements"] = row.wrong_elements;
}

nlohmann::ordered_json bench_row_json(const BenchShape& shape, const BenchRow& row,
                                      const PutRates* puts) {
  const double median = summarize(row.times_us).median;
  nlohmann::ordered_json json;
  json["tokens"] = shape.tokens;
  json["hidden"] = shape.hidden;
  json["topk"] = shape.topk;
  json["experts"] = shape.experts;
  json["dtype"] = short_name(shape.dtype);
  json["num_sms"] = shape.num_sms;
  add_times(row, json);
  json["logical_gbps"] = gigabytes_per_second(row.logical_bytes, median);
  json["wire_gbps"] = gigabytes_per_second(row.wire_bytes, median);
  if (puts != nullptr && row.node_bytes > 0) {
    json["node_gbps"] = gigabytes_per_second(row.node_bytes, median);
    json["put_gbps"] = puts->by_sms.at(shape.num_sms).bytes_per_second / 1e9;
    json["node_vs_put"] = share_of(row, puts->by_sms.at(shape.num_sms));
    json["put_gbps_all_sms"] = puts->all.bytes_per_second / 1e9;
    json["node_vs_put_all_sms"] = share_of(row, puts->all);
  }
  add_checks(row, json);
  return json;
}

}  // namespace deep_ep::cli
