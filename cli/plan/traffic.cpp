#include "plan/traffic.hpp"

#include <algorithm>
#include <cmath>

#include "base/error.hpp"

namespace deep_ep::cli {
namespace {

void validate(const Topology& topology, const Gate& gate) {
  require(topology.nodes >= 1, "nodes is {}, must be at least 1", topology.nodes);
  require(topology.ranks_per_node >= 1, "ranks per node are {}, must be at least 1",
          topology.ranks_per_node);
  require(gate.tokens >= 0, "tokens is {}, must not be negative", gate.tokens);
  require(gate.topk >= 1, "topk is {}, must be at least 1", gate.topk);
  require(gate.experts >= 1 && gate.experts % topology.ranks() == 0,
          "experts is {}, must be a positive multiple of the {} ranks", gate.experts,
          topology.ranks());
  require(gate.max_nodes >= 0, "the nodes of a token are {}, must not be negative", gate.max_nodes);
  require(gate.skew >= 1, "skew is {}, must be at least 1", gate.skew);
}

/// Expected largest of `count` independent counts of a mean, each the sum of events of probability
/// `p`: by the normal law, and never more than the number of events.
double largest(double mean, double p, double count, double events) {
  if (mean <= 0 || count <= 1) return mean;
  const double deviation = std::sqrt(mean * std::max(0.0, 1 - p));
  return std::min(mean + deviation * std::sqrt(2 * std::log(count)), events);
}

/// Probability that a token goes to a rank, and to a node.
struct Odds {
  double rank = 0;
  double node = 0;
};

Odds mean_odds(const Topology& topology, const Gate& gate) {
  const int nodes = gate.max_nodes == 0 ? topology.nodes : std::min(gate.max_nodes, topology.nodes);
  const std::int64_t per_node = gate.experts / topology.nodes;
  const std::int64_t all = per_node * nodes;
  const double chosen = static_cast<double>(nodes) / topology.nodes;
  const auto hit = [&](std::int64_t some) { return chosen * (1 - miss(all, some, gate.topk)); };
  return {hit(gate.experts / topology.ranks()), hit(per_node)};
}

/// The most popular rank and its node, whose other ranks are as popular as any.
Odds hot_odds(const Odds& mean, double skew) {
  const double rank = std::min(1.0, mean.rank * skew);
  if (mean.rank >= 1) return mean;
  return {rank, 1 - (1 - mean.node) * (1 - rank) / (1 - mean.rank)};
}

/// Rows between a rank and others; what the busiest one receives.
Load load(const Topology& topology, double tokens, double pairs, double mean, double hot) {
  const double events = tokens * pairs;
  return {events * mean, largest(events * hot, hot, topology.ranks(), events)};
}

}  // namespace

double miss(std::int64_t all, std::int64_t some, std::int64_t draws) {
  double probability = 1;
  for (std::int64_t i = 0; i < std::min(draws, all); ++i)
    probability *= static_cast<double>(std::max<std::int64_t>(0, all - some - i)) /
                   static_cast<double>(all - i);
  return probability;
}

Traffic expected_traffic(const Topology& topology, const Gate& gate) {
  validate(topology, gate);
  const Odds mean = mean_odds(topology, gate);
  const Odds hot = hot_odds(mean, gate.skew);
  const auto tokens = static_cast<double>(gate.tokens);
  const double ranks = topology.ranks();
  const double per_node = topology.ranks_per_node;
  const double others = topology.nodes - 1;

  Traffic traffic;
  traffic.ranks_per_token = ranks * mean.rank;
  traffic.nodes_per_token = topology.nodes * mean.node;
  traffic.entries_per_token = gate.topk;
  traffic.received = load(topology, tokens, ranks, mean.rank, hot.rank);
  const double own = tokens * mean.rank;
  traffic.direct = {own, load(topology, tokens, per_node - 1, mean.rank, hot.rank),
                    load(topology, tokens, others * per_node, mean.rank, hot.rank)};
  traffic.relayed = {own,
                     load(topology, tokens, (per_node - 1) * topology.nodes, mean.rank, hot.rank),
                     load(topology, tokens, others, mean.node, hot.node)};
  const double spread = gate.topk / traffic.ranks_per_token;
  const auto spread_out = [&](const Load& load) {
    return Load{load.mean * spread, load.busiest * spread};
  };
  traffic.per_expert = {own * spread, spread_out(traffic.direct.local),
                        spread_out(traffic.direct.network)};
  return traffic;
}

namespace {

/// Rows that each rank sends and receives over one kind of link.
class Counter {
 public:
  explicit Counter(int ranks)
      : in_(static_cast<std::size_t>(ranks)), out_(static_cast<std::size_t>(ranks)) {}

  void add(int from, int to, double rows = 1) {
    out_[static_cast<std::size_t>(from)] += rows;
    in_[static_cast<std::size_t>(to)] += rows;
  }
  Load load() const {
    Load load;
    for (std::size_t i = 0; i < in_.size(); ++i) {
      load.mean += in_[i] / static_cast<double>(in_.size());
      load.busiest = std::max({load.busiest, in_[i], out_[i]});
    }
    return load;
  }
  Load received() const { return {load().mean, *std::max_element(in_.begin(), in_.end())}; }

 private:
  std::vector<double> in_, out_;
};

struct Counters {
  explicit Counters(int ranks)
      : received(ranks),
        direct_local(ranks),
        direct_network(ranks),
        relayed_local(ranks),
        relayed_network(ranks),
        expert_local(ranks),
        expert_network(ranks) {}
  Counter received, direct_local, direct_network, relayed_local, relayed_network, expert_local,
      expert_network;
  double own = 0, own_entries = 0, entries = 0, nodes = 0;
};

/// A token of `source` with `entries` of its top-k on `rank`.
void count_row(Counters& counters, int per_node, int source, int rank, double entries) {
  counters.received.add(source, rank);
  counters.entries += entries;
  // The place of the source in the node of the rank: itself, or who passes the row on.
  const int relay = rank / per_node * per_node + source % per_node;
  if (relay != rank) counters.relayed_local.add(relay, rank);
  if (rank == source) {
    counters.own += 1;
    counters.own_entries += entries;
  } else if (rank / per_node == source / per_node) {
    counters.direct_local.add(source, rank);
    counters.expert_local.add(source, rank, entries);
  } else {
    counters.direct_network.add(source, rank);
    counters.expert_network.add(source, rank, entries);
  }
}

void count_token(Counters& counters, const Topology& topology, int source,
                 std::vector<int>& ranks) {
  const int per_node = topology.ranks_per_node;
  std::sort(ranks.begin(), ranks.end());
  int last_node = -1;
  for (std::size_t i = 0; i < ranks.size();) {
    const int rank = ranks[i];
    std::size_t end = i;
    while (end < ranks.size() && ranks[end] == rank) ++end;
    count_row(counters, per_node, source, rank, static_cast<double>(end - i));
    const int node = rank / per_node;
    if (node != last_node) {
      counters.nodes += 1;
      if (node != source / per_node)
        counters.relayed_network.add(source, node * per_node + source % per_node);
    }
    last_node = node;
    i = end;
  }
}

}  // namespace

Traffic count_traffic(const Topology& topology, const Gate& gate, const IdsOf& ids_of) {
  validate(topology, gate);
  const int local_experts = gate.experts / topology.ranks();
  Counters counters(topology.ranks());
  std::vector<int> ranks;
  for (int source = 0; source < topology.ranks(); ++source) {
    const std::vector<std::int64_t> ids = ids_of(source);
    for (std::int64_t token = 0; token < gate.tokens; ++token) {
      ranks.clear();
      for (int k = 0; k < gate.topk; ++k) {
        const std::int64_t id = ids[static_cast<std::size_t>(token * gate.topk + k)];
        if (id >= 0) ranks.push_back(static_cast<int>(id / local_experts));
      }
      count_token(counters, topology, source, ranks);
    }
  }
  const double all_ranks = topology.ranks();
  const double tokens = std::max(1.0, static_cast<double>(gate.tokens) * all_ranks);
  const double own = counters.own / all_ranks;
  Traffic traffic;
  traffic.received = counters.received.received();
  traffic.ranks_per_token = traffic.received.mean * all_ranks / tokens;
  traffic.nodes_per_token = counters.nodes / tokens;
  traffic.entries_per_token = counters.entries / tokens;
  traffic.direct = {own, counters.direct_local.load(), counters.direct_network.load()};
  traffic.relayed = {own, counters.relayed_local.load(), counters.relayed_network.load()};
  traffic.per_expert = {counters.own_entries / all_ranks, counters.expert_local.load(),
                        counters.expert_network.load()};
  return traffic;
}

}  // namespace deep_ep::cli
