#include "contract/choice.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <sstream>
#include <string_view>

#include "contract/suite.hpp"

namespace deep_ep::test {
namespace {

constexpr std::array<std::string_view, 7> kNumbersOfTheirOwn{
    "ranks=", "ranks_per_node=", "tokens=", "max=", "experts=", "seed=", "worst="};

const char* size_of_batch(std::int64_t tokens) {
  return tokens == 0     ? "none"
         : tokens == 1   ? "one"
         : tokens <= 16  ? "few"
         : tokens <= 256 ? "some"
                         : "many";
}

/// Of a Case or a LowLatencyCase.
template <class AnyCase>
void add_values(std::set<std::string>& values, const AnyCase& c) {
  std::istringstream words(c.describe());
  for (std::string word; words >> word;) {
    const auto starts = [&word](std::string_view name) { return word.starts_with(name); };
    if (std::none_of(kNumbersOfTheirOwn.begin(), kNumbersOfTheirOwn.end(), starts))
      values.insert(word);
  }
  std::int64_t least = c.tokens_of(0);
  std::int64_t most = least;
  for (int rank = 1; rank < c.ranks; ++rank) {
    least = std::min(least, c.tokens_of(rank));
    most = std::max(most, c.tokens_of(rank));
  }
  values.insert(fmt::format("nodes={}x{}", c.ranks_per_node > 0 ? c.ranks / c.ranks_per_node : 1,
                            c.ranks_per_node > 0 ? c.ranks_per_node : c.ranks));
  values.insert(fmt::format("tokens={}", size_of_batch(most)));
  values.insert(least == most ? "spread=even" : least == 0 ? "spread=empty" : "spread=ragged");
  values.insert(fmt::format("local_experts={}", size_of_batch(c.experts / c.ranks)));
}

}  // namespace

std::set<std::string> values_of(const Program& program) {
  std::set<std::string> values;
  for (const Step& step : program.steps) {
    if (step.low_latency) {
      add_values(values, *step.low_latency);
      values.insert(step.low_latency->max_tokens > 0 ? "max=more" : "max=tokens");
      continue;
    }
    add_values(values, step.exchange);
    const std::int64_t worst = step.exchange.num_worst_tokens;
    values.insert(worst > 0 ? "worst=more" : worst < 0 ? "worst=fits" : "worst=none");
  }
  if (program.steps.size() > 1) values.insert("steps=several");
  if (program.concurrent) values.insert("concurrent");
  if (program.own_buffers) values.insert("own_buffers");
  if (program.first_ticket > 0) values.insert("first_ticket");
  return values;
}

Choice::Choice(const ProgramSource& source, std::int64_t begin, std::int64_t end,
               std::int64_t every)
    : all_(every == 1) {
  if (all_) return;
  std::set<std::string> tried;
  for (std::int64_t i = begin; i < end; i += every) {
    chosen_.insert(i);
    tried.merge(values_of(source.at(i)));
  }
  for (std::int64_t i = begin; i < end; ++i) {
    std::set<std::string> values = values_of(source.at(i));
    if (std::includes(tried.begin(), tried.end(), values.begin(), values.end())) continue;
    chosen_.insert(i);
    tried.merge(values);
  }
}

}  // namespace deep_ep::test
