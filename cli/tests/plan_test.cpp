#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "deep_ep/error.hpp"
#include "plan/prediction.hpp"
#include "protocol/rail.hpp"
#include "verify/routing.hpp"

namespace deep_ep::cli {
namespace {

/// Drawn as Gate says, by means of its own.
std::vector<std::int64_t> draw(const Topology& topology, const Gate& gate, int rank) {
  std::mt19937_64 random(static_cast<std::uint64_t>(rank) + 17);
  const int per_node = gate.experts / topology.nodes;
  std::vector<int> nodes(static_cast<std::size_t>(topology.nodes));
  for (std::size_t i = 0; i < nodes.size(); ++i) nodes[i] = static_cast<int>(i);
  const int chosen = gate.max_nodes > 0 ? gate.max_nodes : topology.nodes;
  std::vector<std::int64_t> ids;
  for (std::int64_t token = 0; token < gate.tokens; ++token) {
    std::shuffle(nodes.begin(), nodes.end(), random);
    std::vector<std::int64_t> experts;
    for (int i = 0; i < chosen; ++i)
      for (int e = 0; e < per_node; ++e)
        experts.push_back(nodes[static_cast<std::size_t>(i)] * per_node + e);
    std::shuffle(experts.begin(), experts.end(), random);
    ids.insert(ids.end(), experts.begin(), experts.begin() + gate.topk);
  }
  return ids;
}

struct Setting {
  Topology topology;
  Gate gate;
};
std::ostream& operator<<(std::ostream& out, const Setting& one) {
  return out << one.topology.nodes << "x" << one.topology.ranks_per_node << " top-" << one.gate.topk
             << " of " << one.gate.experts << " nodes " << one.gate.max_nodes;
}

class ExpectedTraffic : public testing::TestWithParam<Setting> {
 protected:
  const Topology topology = GetParam().topology;
  const Gate gate = GetParam().gate;
  const Traffic expected = expected_traffic(topology, gate);
  const Traffic counted =
      count_traffic(topology, gate, [this](int rank) { return draw(topology, gate, rank); });
};

void expect_near(const Load& expected, const Load& counted) {
  EXPECT_NEAR(expected.mean, counted.mean, 0.02 * counted.mean + 1);
  EXPECT_NEAR(expected.busiest, counted.busiest, 0.05 * counted.busiest + 8);
}

void expect_near(const Route& expected, const Route& counted) {
  EXPECT_NEAR(expected.own, counted.own, 0.05 * counted.own + 1);
  expect_near(expected.local, counted.local);
  expect_near(expected.network, counted.network);
}

TEST_P(ExpectedTraffic, IsWhatDrawnTokensGive) {
  EXPECT_NEAR(expected.ranks_per_token, counted.ranks_per_token, 0.01 * counted.ranks_per_token);
  EXPECT_NEAR(expected.nodes_per_token, counted.nodes_per_token, 0.01 * counted.nodes_per_token);
  EXPECT_EQ(counted.entries_per_token, gate.topk);
  expect_near(expected.received, counted.received);
  expect_near(expected.direct, counted.direct);
  expect_near(expected.relayed, counted.relayed);
  expect_near(expected.per_expert, counted.per_expert);
}

TEST_P(ExpectedTraffic, LosesNoRow) {
  const auto tokens = static_cast<double>(gate.tokens);
  for (const Traffic& one : {expected, counted}) {
    EXPECT_NEAR(one.received.mean, tokens * one.ranks_per_token, 1e-6 * tokens);
    const auto moved = [](const Route& route) {
      return route.own + route.local.mean + route.network.mean;
    };
    EXPECT_NEAR(moved(one.direct), one.received.mean, 1e-6 * tokens);
    EXPECT_NEAR(moved(one.per_expert), tokens * gate.topk, 1e-6 * tokens);
    // Over the network a row goes once to each node but its own one, if it goes there.
    const double home = one.nodes_per_token / topology.nodes;
    EXPECT_NEAR(one.relayed.network.mean, tokens * (one.nodes_per_token - home),
                0.02 * one.relayed.network.mean + 1);
    // It arrives at a rank that wants it or is passed on; so fewer cross the network.
    EXPECT_LE(one.relayed.network.mean, one.direct.network.mean + 1e-6);
    EXPECT_GE(one.relayed.own + one.relayed.local.mean + one.relayed.network.mean,
              one.received.mean - 1e-6);
    EXPECT_GE(one.received.busiest, one.received.mean);
    const double most = gate.max_nodes > 0 ? gate.max_nodes : topology.nodes;
    EXPECT_LE(one.nodes_per_token, most + 1e-9);
  }
}

TEST_P(ExpectedTraffic, OfOneNodeIsNotRelayed) {
  if (topology.nodes > 1) return;
  for (const Traffic& one : {expected, counted}) {
    EXPECT_EQ(one.relayed.local.mean, one.direct.local.mean);
    EXPECT_EQ(one.relayed.network.mean, 0);
    EXPECT_EQ(one.direct.network.busiest, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Settings, ExpectedTraffic,
    testing::Values(Setting{{1, 1}, {500, 8, 64}}, Setting{{1, 2}, {3000, 8, 256}},
                    Setting{{1, 8}, {1000, 8, 256}}, Setting{{2, 4}, {1000, 6, 64}},
                    Setting{{4, 8}, {500, 8, 256}}, Setting{{8, 4}, {500, 8, 256, 3}},
                    Setting{{16, 2}, {500, 2, 64, 1}}, Setting{{4, 1}, {2000, 3, 8}},
                    Setting{{3, 2}, {1000, 24, 24}}));

TEST(Traffic, TheChanceToBeMissedIsExact) {
  EXPECT_DOUBLE_EQ(miss(4, 1, 1), 0.75);
  EXPECT_DOUBLE_EQ(miss(4, 2, 2), 1.0 / 6);
  EXPECT_EQ(miss(8, 5, 4), 0);  // four draws from eight cannot avoid five
  EXPECT_EQ(miss(8, 0, 8), 1);
  EXPECT_EQ(miss(8, 1, 20), 0);  // more draws than there are
}

TEST(Traffic, EntriesThatNameNobodyAndExpertsOfOneRankCountOnce) {
  const Topology topology{.nodes = 2, .ranks_per_node = 2};
  const Gate gate{.tokens = 2, .topk = 3, .experts = 8};
  // Rank 0: one token to ranks 0 (twice) and 3, one to nobody; the others: all to themselves.
  const Traffic one = count_traffic(topology, gate, [](int rank) -> std::vector<std::int64_t> {
    if (rank == 0) return {0, 1, 7, -1, -1, -1};
    return {rank * 2, -1, -1, rank * 2 + 1, -1, -1};
  });
  EXPECT_DOUBLE_EQ(one.received.mean, 8 / 4.0);
  EXPECT_DOUBLE_EQ(one.received.busiest, 3);  // rank 3
  EXPECT_DOUBLE_EQ(one.direct.own, 7 / 4.0);
  EXPECT_DOUBLE_EQ(one.direct.network.mean, 1 / 4.0);
  EXPECT_DOUBLE_EQ(one.relayed.network.mean, 1 / 4.0);  // to rank 2
  EXPECT_DOUBLE_EQ(one.relayed.local.mean, 1 / 4.0);    // which passes it on
  EXPECT_DOUBLE_EQ(one.direct.local.mean, 0);
  EXPECT_DOUBLE_EQ(one.entries_per_token, 9 / 8.0);
  EXPECT_DOUBLE_EQ(one.nodes_per_token, 8 / 8.0);
}

TEST(Traffic, APopularRankGetsMoreAndTheMeanStays) {
  const Topology topology{.nodes = 4, .ranks_per_node = 8};
  Gate gate;
  const Traffic even = expected_traffic(topology, gate);
  gate.skew = 2;
  const Traffic hot = expected_traffic(topology, gate);
  EXPECT_EQ(hot.received.mean, even.received.mean);
  EXPECT_NEAR(hot.received.busiest, 2 * even.received.mean, 0.05 * hot.received.busiest);
  EXPECT_GT(hot.relayed.network.busiest, even.relayed.network.busiest);
  gate.skew = 1000;  // every token goes there, and no more than that
  EXPECT_DOUBLE_EQ(expected_traffic(topology, gate).received.busiest, 32.0 * 4096);
}

TEST(Traffic, ArgumentsAreCheckedByName) {
  const auto refused = [](const Topology& topology, const Gate& gate) -> std::string {
    try {
      expected_traffic(topology, gate);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(refused({.nodes = 0}, {}), testing::HasSubstr("nodes is 0"));
  EXPECT_THAT(refused({.nodes = 1, .ranks_per_node = 0}, {}), testing::HasSubstr("per node are 0"));
  EXPECT_THAT(refused({.nodes = 3}, {}), testing::HasSubstr("experts is 256"));
  EXPECT_THAT(refused({}, {.tokens = -1}), testing::HasSubstr("tokens is -1"));
  EXPECT_THAT(refused({}, {.topk = 0}), testing::HasSubstr("topk is 0"));
  EXPECT_THAT(refused({}, {.max_nodes = -1}), testing::HasSubstr("-1"));
  EXPECT_THAT(refused({}, {.skew = 0.5}), testing::HasSubstr("skew is 0.5"));
}

std::vector<Prediction> all_of(const Topology& topology, const Gate& gate, const Payload& payload,
                               const Machine& machine) {
  const Traffic traffic = expected_traffic(topology, gate);
  auto all = predict_high_throughput(topology, gate, payload, machine, traffic);
  for (const Prediction& one : predict_low_latency(topology, gate, payload, machine, traffic))
    all.push_back(one);
  return all;
}

/// No call gets faster from `before` to `after`, and at least one gets slower.
void expect_slower(const std::vector<Prediction>& before, const std::vector<Prediction>& after) {
  ASSERT_EQ(before.size(), after.size());
  double gained = 0;
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_GE(after[i].total_us, before[i].total_us - 1e-9) << to_string(before[i].operation);
    gained += after[i].total_us - before[i].total_us;
  }
  EXPECT_GT(gained, 0);
}

TEST(Prediction, MoreWorkAndSlowerMachinesTakeLonger) {
  const Topology topology{.nodes = 4, .ranks_per_node = 8};
  const auto with = [&](auto change) {
    Gate gate;
    Payload payload;
    Machine machine;
    change(gate, payload, machine);
    return all_of(topology, gate, payload, machine);
  };
  const auto base = with([](Gate&, Payload&, Machine&) {});
  expect_slower(base, with([](Gate& gate, Payload&, Machine&) { gate.tokens *= 2; }));
  expect_slower(base, with([](Gate& gate, Payload&, Machine&) { gate.skew = 3; }));
  expect_slower(base, with([](Gate& gate, Payload&, Machine&) { gate.topk = 12; }));
  expect_slower(base, with([](Gate&, Payload& payload, Machine&) { payload.hidden *= 2; }));
  expect_slower(base, with([](Gate&, Payload& payload, Machine&) { payload.value_bytes = 4; }));
  expect_slower(base, with([](Gate&, Payload&, Machine& machine) { machine.network_gbps /= 2; }));
  expect_slower(base, with([](Gate&, Payload&, Machine& machine) { machine.local_gbps /= 20; }));
  expect_slower(base, with([](Gate&, Payload&, Machine& machine) { machine.network_us += 5; }));
  expect_slower(base, with([](Gate&, Payload&, Machine& machine) {
                  machine.call_us += 5, machine.low_latency_call_us += 5;
                }));
  expect_slower(base, with([](Gate&, Payload&, Machine& machine) { machine.sum_gbps /= 100; }));
  expect_slower(base,
                with([](Gate&, Payload&, Machine& machine) { machine.network_mrate = 1e-3; }));
}

TEST(Prediction, MoreNodesSendMoreOverTheNetwork) {
  double network = -1;
  for (const int nodes : {1, 2, 4, 8, 16, 32}) {
    const Topology topology{.nodes = nodes, .ranks_per_node = 8};
    const Gate gate;
    const auto all = all_of(topology, gate, Payload{}, Machine{});
    // No byte is lost: rows of low latency go to each rank, or to each expert, or stay.
    for (const std::size_t i : {3, 4, 5, 6}) {
      const double ranks = i < 5 ? expected_traffic(topology, gate).ranks_per_token : gate.topk;
      EXPECT_NEAR(all[i].own_bytes + all[i].local_bytes.mean + all[i].network_bytes.mean,
                  static_cast<double>(gate.tokens) * ranks * all[i].row_bytes,
                  1e-9 * all[i].row_bytes * 1e6)
          << to_string(all[i].operation);
    }
    EXPECT_GT(all[1].network_bytes.mean, network) << nodes << " nodes";
    network = all[1].network_bytes.mean;
    for (const Prediction& one : all) {
      EXPECT_DOUBLE_EQ(one.total_us,
                       one.wait_us + std::max({one.local_us, one.network_us, one.compute_us}));
      EXPECT_EQ(one.network_messages > 0, nodes > 1) << to_string(one.operation);
      EXPECT_GE(one.memory_bytes, 0);
    }
  }
}

TEST(Prediction, CountsGoOverTheNetworkOnceToANode) {
  for (const int nodes : {2, 8, 64}) {
    const Topology topology{.nodes = nodes, .ranks_per_node = 8};
    const Gate gate{.experts = 1024};
    const Prediction notify = all_of(topology, gate, {}, {})[0];
    EXPECT_EQ(notify.network_messages, nodes - 1);
    EXPECT_EQ(notify.local_messages, 7);
    // Entries for each expert of the node, and what is as long for all.
    EXPECT_EQ(notify.network_row_bytes - 4.0 * 1024 / nodes, sizeof(protocol::RailMessage));
    EXPECT_EQ(notify.network_bytes.busiest, (nodes - 1) * notify.network_row_bytes);
  }
}

TEST(Prediction, SmallCallsWaitAndLargeOnesAreBoundByALink) {
  const Topology topology{.nodes = 8, .ranks_per_node = 8};
  EXPECT_STREQ(all_of(topology, {.tokens = 1}, {}, {})[3].bound, "waits");
  EXPECT_STREQ(all_of(topology, {}, {}, {})[1].bound, "network");
  EXPECT_STREQ(all_of(topology, {}, {}, {.local_gbps = 20})[1].bound, "local");
  EXPECT_STREQ(all_of({.nodes = 1, .ranks_per_node = 1}, {}, {}, {})[1].bound, "processors");
}

/// Tables of docs/scaling.md: what was measured, and what is predicted of it.
struct Measured {
  const char* what;
  Topology topology;
  Gate gate;
  Payload payload;
  Machine machine;
  int index;  // into all_of
  double us;
  double off;  // allowed deviation, relative
};

Payload fp8() { return {.hidden = 7168, .value_bytes = 1, .scale_group = 128}; }
/// H800 and ConnectX-7 of DeepEP's published figures: links of 160 and 50 GB/s nominally.
Machine h800() {
  return {.local_gbps = 160, .network_gbps = 45, .call_us = 20, .low_latency_call_us = 20};
}
/// The host of docs/performance.md at its slow speed: two cores, whose stores are all that counts.
Machine two_cores(int ranks) {
  const double share = 2.0 / std::max(2, ranks);
  return {.local_gbps = 1000, .call_us = 10, .write_gbps = 12.9 * share, .sum_gbps = 12.7 * share};
}

/// The same two cores as two nodes of two ranks, which share 2 Gbit/s: what ucp_put_bw reached.
Machine two_nodes_over_tcp() {
  Machine machine = two_cores(4);
  machine.network_gbps = 0.244 / 2;
  return machine;
}
/// Two H200 as nodes, 132 SMs: what puts reach, and a call of one token takes, in the same run.
Machine two_h200_as_nodes() {
  return {
      .network_gbps = 366, .network_us = 2, .call_us = 28, .write_gbps = 1400, .sum_gbps = 1850};
}

TEST(Prediction, IsNearWhatWasMeasured) {
  const Topology one{.nodes = 1, .ranks_per_node = 1};
  const Measured all[] = {
      {"H100, 16 SMs, dispatch BF16", one, {}, {}, {}, 1, 113, 0.05},
      {"H100, 16 SMs, dispatch FP8", one, {}, fp8(), {}, 1, 65, 0.05},
      {"H100, 16 SMs, combine BF16", one, {}, {}, {}, 2, 133, 0.05},
      {"H100 low latency dispatch, T=1", one, {.tokens = 1}, fp8(), {}, 3, 8.8, 0.2},
      {"H100 low latency dispatch, T=64", one, {.tokens = 64}, fp8(), {}, 3, 10.0, 0.2},
      {"H100 low latency dispatch, T=256", one, {.tokens = 256}, fp8(), {}, 3, 22.2, 0.2},
      {"H100 low latency combine, T=256", one, {.tokens = 256}, fp8(), {}, 4, 25.5, 0.2},
      {"host R=2 dispatch", {1, 2}, {}, {}, two_cores(2), 1, 9100, 0.05},
      {"host R=4 dispatch", {1, 4}, {}, {}, two_cores(4), 1, 32000, 0.1},
      {"host R=2 combine", {1, 2}, {}, {}, two_cores(2), 2, 9300, 0.05},
      {"host R=4 combine", {1, 4}, {}, {}, two_cores(4), 2, 37000, 0.15},
      {"host 2 x 2 over TCP, dispatch", {2, 2}, {}, {}, two_nodes_over_tcp(), 1, 483000, 0.02},
      {"host 2 x 2 over TCP, combine", {2, 2}, {}, {}, two_nodes_over_tcp(), 2, 485000, 0.02},
      // Floors: rings keep the link idle in between.
      {"two H200 as nodes, dispatch", {2, 1}, {}, {}, two_h200_as_nodes(), 1, 262, 0.3},
      {"two H200 as nodes, combine", {2, 1}, {}, {}, two_h200_as_nodes(), 2, 256, 0.3},
  };
  for (const Measured& row : all) {
    const double predicted = all_of(row.topology, row.gate, row.payload,
                                    row.machine)[static_cast<std::size_t>(row.index)]
                                 .total_us;
    EXPECT_NEAR(predicted / row.us, 1, row.off) << row.what << ": " << predicted;
  }
}

struct Published {
  int nodes;
  double dispatch_gbps;  // high throughput, FP8, four nodes a token; own node's rows counted
  double low_latency_us, low_latency_combine_us;  // a message for each (token, expert)
};

TEST(Prediction, IsNearDeepEpsPublishedFigures) {
  const Gate limited{.max_nodes = 4};
  constexpr double kRowKilobytes = 7.392;
  for (const Published& one :
       {Published{2, 43, 118, 195}, Published{4, 58, 155, 273}, Published{8, 51, 173, 314},
        Published{16, 0, 192, 369}, Published{32, 0, 194, 360}}) {
    const Topology topology{.nodes = one.nodes, .ranks_per_node = 8};
    const double nodes = expected_traffic(topology, limited).nodes_per_token;
    const double us = all_of(topology, limited, fp8(), h800())[1].total_us;
    const double gbps = 4096 * kRowKilobytes * nodes / us;
    if (one.dispatch_gbps > 0) {
      EXPECT_NEAR(gbps / one.dispatch_gbps, 1, 0.3) << one.nodes << " nodes: " << gbps;
    }
    const auto low = all_of(topology, {.tokens = 128}, fp8(), h800());
    EXPECT_NEAR(low[5].total_us / one.low_latency_us, 1, 0.12)
        << one.nodes << " nodes: " << low[5].total_us;
    EXPECT_NEAR(low[6].total_us / one.low_latency_combine_us, 1, 0.12)
        << one.nodes << " nodes: " << low[6].total_us;
  }
}

}  // namespace
}  // namespace deep_ep::cli
