#pragma once

#include <string>
#include <vector>

#include "distributed.hpp"
#include "one_process.hpp"

// What rank 0 prints.
namespace moe {

struct Run {
  std::string text_name;
  ModelShape shape;
  std::vector<std::int64_t> tokens;  ///< of each rank
};

void print_run(const Run& run);
/// A bar for each expert, grouped by the rank that owns it.
void print_load(const Run& run, const Account& total);
void print_bytes(const Run& run, const Account& total);
/// `slowest`: for each phase the time of the rank that took longest.
void print_times(const Account& slowest);
void print_difference(int layer, const Difference& difference);
/// `seconds`: what the single process took for all layers.
void print_verdict(std::int64_t values, std::int64_t outside, double seconds);

}  // namespace moe
