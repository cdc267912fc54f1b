#include "contract/network_plan.hpp"

#include <algorithm>
#include <set>
#include <vector>

#include "plan/internode.hpp"
#include "plan/wire.hpp"
#include "verify/expected.hpp"
#include "verify/low_latency_expected.hpp"
#include "verify/low_latency_turns.hpp"

namespace deep_ep::test {
namespace {

using verify::Case;
using verify::LowLatencyCase;

/// Distinct places of other nodes that a token goes to, summed over the tokens of `rank`. A place
/// is `ranks_a_place` ranks.
struct Crossings {
  int ranks;
  int ranks_per_node;
  int experts;
  int topk;
  int ranks_a_place;

  std::int64_t count(const std::vector<std::int64_t>& topk_idx, int rank) const {
    std::int64_t crossings = 0;
    for (auto ids = topk_idx.begin(); ids != topk_idx.end(); ids += topk) {
      std::set<std::int64_t> places;
      std::for_each(ids, ids + topk, [&](std::int64_t id) {
        const std::int64_t owner = id / (experts / ranks);
        if (id >= 0 && owner / ranks_per_node != rank / ranks_per_node)
          places.insert(owner / ranks_a_place);
      });
      crossings += static_cast<std::int64_t>(places.size());
    }
    return crossings;
  }
};

/// A record for each node, and its sum home.
std::int64_t bytes_of(const Case& c) {
  const Crossings crossings{c.ranks, c.ranks_per_node, c.experts, c.topk, c.ranks_per_node};
  const auto x_bytes = c.hidden * static_cast<std::int64_t>(size_of(c.dtype));
  const std::int64_t scale_bytes =
      c.scales == verify::Scales::kNone
          ? 0
          : verify::num_scales(c) *
                static_cast<std::int64_t>(size_of(verify::scales_dtype(c.scales)));
  const plan::RecordFormat record({.x_bytes = x_bytes, .scale_bytes = scale_bytes},
                                  c.ranks_per_node);
  const plan::SumFormat sum(0, c.hidden * static_cast<std::int64_t>(size_of(c.combine_dtype)));
  const auto routings = verify::make_routings(c);
  std::int64_t records = 0;
  for (int rank = 0; rank < c.ranks; ++rank)
    records += crossings.count(routings[static_cast<std::size_t>(rank)].topk_idx, rank);
  return records * ((1 + c.cached_repeats) * record.bytes + c.combines * sum.bytes);
}

/// A message for each rank, and its sum home.
std::int64_t bytes_of(const LowLatencyCase& c) {
  if (c.masked != LowLatencyCase::kNobody) return 0;
  const Crossings crossings{c.ranks, c.ranks_per_node, c.experts, c.topk, 1};
  const verify::LowLatencyRows rows(c);
  const auto x_bytes = c.hidden * static_cast<std::int64_t>(size_of(rows.recv_dtype));
  std::vector<std::int64_t> messages;
  for (int round = 0; round < c.dispatches; ++round) {
    const verify::LowLatencyExpected dispatch(c, round);
    messages.push_back(0);
    for (int rank = 0; rank < c.ranks; ++rank)
      messages.back() += crossings.count(dispatch.topk_idx[static_cast<std::size_t>(rank)], rank);
  }
  std::int64_t bytes = 0;
  for (const std::int64_t count : messages) bytes += count * x_bytes;
  for (int i = 0; i < c.combines; ++i)
    bytes += messages[static_cast<std::size_t>(verify::dispatch_of(c, i))] *
             plan::wire_row_bytes(c.wire, c.hidden);
  return bytes;
}

}  // namespace

std::int64_t bytes_between_nodes(const Program& program) {
  if (program.ranks_per_node == 0 || program.ranks_per_node == program.ranks) return 0;
  std::int64_t bytes = 0;
  for (const Step& step : program.steps)
    bytes += step.low_latency ? bytes_of(*step.low_latency) : bytes_of(step.exchange);
  return bytes;
}

}  // namespace deep_ep::test
