#pragma once

#include <string>
#include <utility>
#include <vector>

#include "contract/program.hpp"

namespace deep_ep::test {

/// Collects programs under their names; those that need more ranks than there are are left out.
class CornerList {
 public:
  explicit CornerList(const Limits& limits) : limits_(limits) {}

  void add(std::string name, std::vector<verify::Case> cases, void (*change)(Program&) = nullptr) {
    Program program = start(std::move(name), cases.front().ranks);
    program.ranks_per_node = cases.front().ranks_per_node;
    for (verify::Case& c : cases) {
      fit(c, limits_.bytes);
      program.steps.push_back({0, std::move(c)});
    }
    if (change != nullptr) change(program);
    finish(std::move(program));
  }

  void add(std::string name, std::vector<verify::LowLatencyCase> cases,
           std::int64_t first_ticket = 0) {
    Program program = start(std::move(name), cases.front().ranks);
    program.first_ticket = first_ticket;
    for (verify::LowLatencyCase& c : cases) {
      fit(c, limits_.bytes);
      // Masks need a Buffer that allows them.
      program.own_buffers = program.own_buffers || c.masked != verify::LowLatencyCase::kNobody;
      Step step;
      step.low_latency = std::move(c);
      program.steps.push_back(std::move(step));
    }
    finish(std::move(program));
  }

  /// `c` with more and more tokens on new Buffers, and with few again.
  void add_growth(verify::Case c) {
    c.hidden = 4096;
    std::vector<verify::Case> cases;
    for (std::int64_t tokens : {1, 8, 64, 512, 4096, 3}) {
      c.tokens = {tokens};
      cases.push_back(c);
    }
    add("memory_grows", cases, [](Program& program) { program.own_buffers = true; });
  }

  std::vector<Program> take() { return std::move(programs_); }

 private:
  static Program start(std::string name, int ranks) {
    Program program;
    program.name = "corner/" + std::move(name);
    program.ranks = ranks;
    return program;
  }
  void finish(Program program) {
    if (program.ranks <= limits_.max_ranks) programs_.push_back(std::move(program));
  }

  Limits limits_;
  std::vector<Program> programs_;
};

}  // namespace deep_ep::test
