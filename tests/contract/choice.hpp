#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "contract/program.hpp"

namespace deep_ep::test {

class ProgramSource;

/// What a program tries of each parameter, as texts "name=value"; of numbers of tokens and of
/// experts which kind.
std::set<std::string> values_of(const Program& program);

/// Of the programs [begin, end) each `every`-th, and of the others those without which a value that
/// some program has would never be tried. All if `every` is 1.
class Choice {
 public:
  Choice(const ProgramSource& source, std::int64_t begin, std::int64_t end, std::int64_t every);

  bool has(std::int64_t program) const { return all_ || chosen_.contains(program); }

 private:
  bool all_;
  std::set<std::int64_t> chosen_;
};

}  // namespace deep_ep::test
