#include "verify/routing.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/error.hpp"
#include "verify/random.hpp"

namespace deep_ep::verify {
namespace {

constexpr std::array<std::pair<Routing, const char*>, 9> kNames{{
    {Routing::kUniform, "uniform"},
    {Routing::kZipf, "zipf"},
    {Routing::kGrouped, "grouped"},
    {Routing::kAllToAll, "all-to-all"},
    {Routing::kToRankZero, "to-rank-zero"},
    {Routing::kToSelf, "to-self"},
    {Routing::kNone, "none"},
    {Routing::kHoles, "holes"},
    {Routing::kDuplicates, "duplicates"},
}};

// The first entries of a shuffle that goes on from token to token: each draw is uniform, whatever
// the order was before.
class Shuffle {
 public:
  Shuffle(std::int64_t first, std::int64_t count) : ids_(static_cast<std::size_t>(count)) {
    std::iota(ids_.begin(), ids_.end(), first);
  }

  void draw(Random& random, std::int64_t* out, int count) {
    const auto size = static_cast<std::int64_t>(ids_.size());
    for (int k = 0; k < count; ++k) {
      const std::int64_t place = k % size;
      std::swap(ids_[static_cast<std::size_t>(place)],
                ids_[static_cast<std::size_t>(place + random.below(size - place))]);
      out[k] = ids_[static_cast<std::size_t>(place)];
    }
  }

 private:
  std::vector<std::int64_t> ids_;
};

// Weighted draws without replacement: the smallest of exponential variables with rate w_e.
void draw_zipf(const RoutingSpec& spec, Random& random, std::int64_t* out) {
  std::vector<double> inverse_weight(static_cast<std::size_t>(spec.experts));
  for (std::size_t e = 0; e < inverse_weight.size(); ++e)
    inverse_weight[e] = std::pow(static_cast<double>(e + 1), spec.skew);
  std::vector<std::pair<double, std::int64_t>> arrivals(inverse_weight.size());
  const int distinct = std::min(spec.topk, spec.experts);
  for (std::int64_t token = 0; token < spec.tokens; ++token, out += spec.topk) {
    for (std::size_t e = 0; e < arrivals.size(); ++e)
      arrivals[e] = {-std::log(random.unit()) * inverse_weight[e], static_cast<std::int64_t>(e)};
    std::partial_sort(arrivals.begin(), arrivals.begin() + distinct, arrivals.end());
    for (int k = 0; k < spec.topk; ++k)
      out[k] = arrivals[static_cast<std::size_t>(k % distinct)].second;
  }
}

void draw_grouped(const RoutingSpec& spec, Random& random, std::int64_t* out) {
  const std::int64_t local = spec.experts / spec.ranks;
  const int groups = std::min(2, spec.ranks);
  Shuffle ranks(0, spec.ranks);
  Shuffle slots(0, local * groups);
  for (std::int64_t token = 0; token < spec.tokens; ++token, out += spec.topk) {
    std::array<std::int64_t, 2> chosen{};
    ranks.draw(random, chosen.data(), groups);
    slots.draw(random, out, spec.topk);
    for (int k = 0; k < spec.topk; ++k)
      out[k] = chosen[static_cast<std::size_t>(out[k] / local)] * local + out[k] % local;
  }
}

void draw_range(const RoutingSpec& spec, Random& random, std::int64_t first, std::int64_t count,
                std::int64_t* out) {
  Shuffle experts(first, count);
  for (std::int64_t token = 0; token < spec.tokens; ++token)
    experts.draw(random, out + token * spec.topk, spec.topk);
}

void draw_all_to_all(const RoutingSpec& spec, Random& random, std::int64_t* out) {
  const std::int64_t local = spec.experts / spec.ranks;
  const int rounds = (spec.topk + spec.ranks - 1) / spec.ranks;
  Shuffle slots(0, local);
  std::vector<std::int64_t> drawn(static_cast<std::size_t>(rounds));
  for (std::int64_t token = 0; token < spec.tokens; ++token, out += spec.topk) {
    slots.draw(random, drawn.data(), rounds);
    for (int k = 0; k < spec.topk; ++k)
      out[k] = k % spec.ranks * local + drawn[static_cast<std::size_t>(k / spec.ranks)];
  }
}

void punch_holes(const RoutingSpec& spec, Random& random, std::int64_t* out) {
  for (std::int64_t token = 0; token < spec.tokens; ++token)
    for (int k = 0; k < spec.topk; ++k)
      if (token % 8 == 3 || random.below(2) == 0) out[token * spec.topk + k] = -1;
}

void repeat_entries(const RoutingSpec& spec, std::int64_t* out) {
  for (std::int64_t token = 0; token < spec.tokens; ++token)
    for (int k = 1; k < spec.topk; k += 2)
      out[token * spec.topk + k] = out[token * spec.topk + k - 1];
}

}  // namespace

const char* to_string(Routing routing) {
  for (const auto& [value, name] : kNames)
    if (value == routing) return name;
  return "unknown";
}

Routing routing_from(std::string_view name) {
  std::string allowed;
  for (const auto& [value, known] : kNames) {
    if (name == known) return value;
    allowed += (allowed.empty() ? "" : ", ") + std::string(known);
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("routing '{}' is unknown; allowed: {}", name, allowed));
}

std::vector<std::int64_t> make_routing(const RoutingSpec& spec) {
  require(spec.ranks >= 1 && spec.experts >= 1 && spec.experts % spec.ranks == 0,
          "experts = {} must be a positive multiple of ranks = {}", spec.experts, spec.ranks);
  require(spec.topk >= 1, "topk = {} must be at least 1", spec.topk);
  std::vector<std::int64_t> ids(static_cast<std::size_t>(spec.tokens * spec.topk), -1);
  Random random(make_key(spec.seed, 0x726f757465, spec.rank));
  const std::int64_t local = spec.experts / spec.ranks;
  switch (spec.routing) {
    case Routing::kZipf:
      draw_zipf(spec, random, ids.data());
      break;
    case Routing::kGrouped:
      draw_grouped(spec, random, ids.data());
      break;
    case Routing::kAllToAll:
      draw_all_to_all(spec, random, ids.data());
      break;
    case Routing::kToRankZero:
      draw_range(spec, random, 0, local, ids.data());
      break;
    case Routing::kToSelf:
      draw_range(spec, random, spec.rank * local, local, ids.data());
      break;
    case Routing::kNone:
      break;
    case Routing::kUniform:
    case Routing::kHoles:
    case Routing::kDuplicates:
      draw_range(spec, random, 0, spec.experts, ids.data());
      if (spec.routing == Routing::kHoles) punch_holes(spec, random, ids.data());
      if (spec.routing == Routing::kDuplicates) repeat_entries(spec, ids.data());
      break;
  }
  return ids;
}

}  // namespace deep_ep::verify
