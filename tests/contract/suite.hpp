#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "contract/program.hpp"
#include "contract/runner.hpp"

namespace deep_ep::test {

struct SuiteOptions {
  std::int64_t from = 0;
  std::int64_t count = -1;  ///< -1: to the end
  std::int64_t every = 1;   ///< of those one in so many, and what else no value may miss (Choice)
  std::string filter{};     ///< only programs whose name contains it
  /// The ranks' processes can be joined once only, all of them: programs run by number of ranks,
  /// and new processes are forked for another number, or after a failure.
  bool one_world = false;
  double max_seconds = 0;  ///< stop before the next program after so long; 0: no limit
  std::string replay{};    ///< flags that select the same list of programs again
  /// What the nodes' devices have sent so far: each program has to make it grow by its rows that
  /// cross at least. Empty: there are no devices.
  std::function<std::int64_t()> sent_bytes{};
};

/// Where the programs come from: a list, or a function of the seed.
class ProgramSource {
 public:
  virtual ~ProgramSource() = default;
  virtual std::int64_t size() const = 0;
  virtual Program at(std::int64_t i) const = 0;
};

/// Runs programs on one pool of ranks, prints what fails with the flags that repeat it, and closes
/// with "N passed, N failed, N skipped". Returns the exit status.
int run_suite(const ProgramSource& source, const Target& target, const SuiteOptions& options);

}  // namespace deep_ep::test
