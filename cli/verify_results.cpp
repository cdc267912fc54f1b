#include "verify_results.hpp"

#include <fmt/format.h>

#include <cstdio>

#include <nlohmann/json.hpp>

namespace deep_ep::cli {

using verify::CaseResult;

CaseResult gather_result(Bootstrap& bootstrap, const CaseResult& own) {
  const nlohmann::json json{own.checked_elements, own.wrong_elements, own.checked_outputs,
                            own.first_mismatch};
  CaseResult sum;
  const auto parts = bootstrap.all_gather(json.dump());
  for (std::size_t rank = 0; rank < parts.size(); ++rank) {
    const auto part = nlohmann::json::parse(parts[rank]);
    CaseResult result;
    result.checked_elements = part[0];
    result.wrong_elements = part[1];
    result.checked_outputs = part[2];
    result.first_mismatch = part[3];
    if (!result.first_mismatch.empty())
      result.first_mismatch = fmt::format("rank {}: {}", rank, result.first_mismatch);
    sum.merge(result);
  }
  return sum;
}

void print_result(const std::string& name, const std::string& numbers, const CaseResult& result,
                  bool verbose) {
  fmt::print("{}  {:<44} {:>12} elements", result.passed() ? "ok  " : "FAIL", name,
             result.checked_elements);
  if (!result.passed())
    fmt::print("\n      {} wrong; first: {}\n      {}", result.wrong_elements,
               result.first_mismatch, numbers);
  else if (verbose)
    fmt::print("\n      {}", numbers);
  fmt::print("\n");
  std::fflush(stdout);
}

}  // namespace deep_ep::cli
