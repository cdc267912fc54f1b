#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "bench_intranode.hpp"
#include "put_rates.hpp"

namespace deep_ep::cli {

/// The table's heading: machine, date, and what the columns mean.
void print_bench_header(const std::string& command, int ranks, const BenchSettings& settings,
                        const std::string& transport);
/// `puts` or null: bytes to other nodes are laid beside them.
void print_bench_row(const BenchShape& shape, const BenchRow& row, const PutRates* puts);
// What the JSON of a row has in every mode.
void add_times(const BenchRow& row, nlohmann::ordered_json& json);
void add_checks(const BenchRow& row, nlohmann::ordered_json& json);
nlohmann::ordered_json bench_row_json(const BenchShape& shape, const BenchRow& row,
                                      const PutRates* puts);

}  // namespace deep_ep::cli
