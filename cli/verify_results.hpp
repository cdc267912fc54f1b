#pragma once

#include <string>

#include "deep_ep/bootstrap.hpp"
#include "verify/case.hpp"

namespace deep_ep::cli {

/// Collective: all ranks' findings, the same on every rank.
verify::CaseResult gather_result(Bootstrap& bootstrap, const verify::CaseResult& own);

/// A line for a case; more if it failed, with its `numbers`, for repeating it by hand.
void print_result(const std::string& name, const std::string& numbers,
                  const verify::CaseResult& result, bool verbose);

}  // namespace deep_ep::cli
