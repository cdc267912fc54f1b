#include "contract/choice.hpp"

#include <gmock/gmock.h>

#include <algorithm>
#include <vector>

#include "contract/suite.hpp"

namespace deep_ep::test {
namespace {

class Listed final : public ProgramSource {
 public:
  explicit Listed(std::vector<Program> programs) : programs_(std::move(programs)) {}
  std::int64_t size() const override { return static_cast<std::int64_t>(programs_.size()); }
  Program at(std::int64_t i) const override { return programs_.at(static_cast<std::size_t>(i)); }

 private:
  std::vector<Program> programs_;
};

std::set<std::string> values_of_all(const ProgramSource& source, const Choice& choice) {
  std::set<std::string> values;
  for (std::int64_t i = 0; i < source.size(); ++i)
    if (choice.has(i)) values.merge(values_of(source.at(i)));
  return values;
}

std::int64_t count(const ProgramSource& source, const Choice& choice) {
  std::int64_t chosen = 0;
  for (std::int64_t i = 0; i < source.size(); ++i) chosen += choice.has(i) ? 1 : 0;
  return chosen;
}

/// All programs of a mode, as the suite has them.
std::vector<Listed> modes() {
  const Limits limits;
  std::vector<Program> exchange = internode_corner_programs(limits);
  for (Program& program : covering_programs(1, limits, true))
    exchange.push_back(std::move(program));
  std::vector<Program> low_latency = low_latency_corner_programs(limits);
  for (Program& program : low_latency_covering_programs(1, limits))
    low_latency.push_back(std::move(program));
  std::vector<Listed> all;
  all.emplace_back(std::move(exchange));
  all.emplace_back(spread_over_nodes(std::move(low_latency)));
  return all;
}

TEST(Choice, NoValueIsMissing) {
  for (const Listed& source : modes()) {
    const Choice all(source, 0, source.size(), 1);
    EXPECT_EQ(count(source, all), source.size());
    for (const int every : {2, 3, 4, 7}) {
      const Choice some(source, 0, source.size(), every);
      EXPECT_EQ(values_of_all(source, some), values_of_all(source, all)) << "every " << every;
    }
  }
}

TEST(Choice, IsNotMuchMoreThanAsked) {
  for (const Listed& source : modes()) {
    EXPECT_LE(count(source, Choice(source, 0, source.size(), 2)), source.size() * 3 / 5);
    EXPECT_LE(count(source, Choice(source, 0, source.size(), 4)), source.size() * 2 / 5);
  }
}

TEST(Choice, TakesAValueThatOnlyProgramsInBetweenHave) {
  std::vector<Program> programs(6);
  for (Program& program : programs) program.steps.emplace_back();
  programs[3].steps[0].exchange.topk = 9;
  programs[5].steps[0].exchange.topk = 9;
  const Listed source(std::move(programs));
  const Choice choice(source, 0, source.size(), 2);
  EXPECT_TRUE(choice.has(0) && choice.has(2) && choice.has(4));
  EXPECT_TRUE(choice.has(3));
  EXPECT_FALSE(choice.has(1) || choice.has(5));
}

TEST(Choice, ShapesOfNodesAreValues) {
  Program program;
  program.steps.emplace_back();
  program.steps[0].exchange.ranks = 6;
  program.steps[0].exchange.ranks_per_node = 2;
  program.steps[0].exchange.tokens = {0, 0, 7, 0, 0, 0};
  EXPECT_THAT(values_of(program),
              testing::IsSupersetOf({"nodes=3x2", "tokens=few", "spread=empty", "topk=8"}));
}

}  // namespace
}  // namespace deep_ep::test
