#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <string>

#include "../multi/in_ranks.hpp"
#include "deep_ep/deep_ep.hpp"
#include "namespaces.hpp"
#include "verify/case.hpp"
#include "verify/low_latency_case.hpp"

// Whole Buffers over nodes that share no memory and no loopback: a network namespace each. Nothing
// poses: the Buffers find the nodes.
namespace deep_ep {
namespace {

using net::Namespaces;

verify::Case case_of(const Buffer& buffer, std::int64_t tokens, std::int64_t hidden) {
  verify::Case c;
  c.ranks = buffer.num_ranks();
  c.ranks_per_node = buffer.num_ranks_per_node();
  c.experts = 8 * c.ranks;
  c.tokens = {tokens};
  c.hidden = hidden;
  c.biases = 2;
  return c;
}

template <class Case>
void expect_right(Buffer& buffer, const Case& c) {
  const verify::CaseResult result = verify::run_case(buffer, c);
  EXPECT_TRUE(result.passed()) << result.first_mismatch;
  EXPECT_GT(result.checked_elements, 0);
}

TEST(InternodeNodes, BuffersFindTheNodesAndExchangeOverTheirNetwork) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(3);
  in_ranks(6, [&](Bootstrap& own) {
    net::live_on(nodes, own.rank() / 2);
    const std::shared_ptr<Bootstrap> bootstrap(std::shared_ptr<void>(), &own);
    Buffer buffer(bootstrap, {.timeout = std::chrono::seconds(20)});
    EXPECT_EQ(buffer.num_nodes(), 3);
    EXPECT_EQ(buffer.num_ranks_per_node(), 2);
    verify::Case c = case_of(buffer, 100, 1024);
    expect_right(buffer, c);
    c.dtype = DType::kFloat8E4m3;
    c.scales = verify::Scales::kFloat32ColumnMajor;
    c.async = true;
    c.cached_repeats = c.combines = 3;
    expect_right(buffer, c);
    buffer.barrier();
    own.barrier();
  });
}

TEST(InternodeNodes, LowLatencyCrossesTheirNetworkToo) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(3);
  in_ranks(6, [&](Bootstrap& own) {
    net::live_on(nodes, own.rank() / 2);
    verify::LowLatencyCase c;
    c.ranks = own.size();
    c.ranks_per_node = 2;
    c.experts = 8 * c.ranks;
    c.tokens = {24};
    c.hidden = 1024;
    c.dispatches = 4;
    c.combines = 5;
    const std::shared_ptr<Bootstrap> bootstrap(std::shared_ptr<void>(), &own);
    Buffer buffer(bootstrap, {.num_rdma_bytes = c.buffer_bytes(),
                              .low_latency_mode = true,
                              .timeout = std::chrono::seconds(20)});
    EXPECT_EQ(buffer.num_nodes(), 3);
    expect_right(buffer, c);
    c.hooks = verify::Hooks::kCrossed;
    c.rank_major = true;
    expect_right(buffer, c);
    // Beside calls of the other mode, on the same heap.
    expect_right(buffer, case_of(buffer, 50, 512));
    c.wire = plan::WireFormat::kLogFmt;
    c.payload = verify::LowLatencyPayload::kBfloat16;
    expect_right(buffer, c);
    buffer.barrier();
    own.barrier();
  });
}

// A message crosses once for each rank, not for each expert.
TEST(InternodeNodes, OfLowLatencyNothingCrossesTwice) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(2);
  in_ranks(2, [&](Bootstrap& own) {
    net::live_on(nodes, own.rank());
    const std::shared_ptr<Bootstrap> bootstrap(std::shared_ptr<void>(), &own);
    constexpr std::int64_t kTokens = 128;
    constexpr std::int64_t kHidden = 7168;
    Buffer buffer(bootstrap, {.num_rdma_bytes =
                                  Buffer::get_low_latency_rdma_size_hint(kTokens, kHidden, 2, 8, 8),
                              .low_latency_mode = true,
                              .timeout = std::chrono::seconds(20)});
    const std::vector<std::uint16_t> x(kTokens * kHidden, 0x3f80);
    std::vector<std::int64_t> ids;  // all experts: every token goes to both ranks
    for (std::int64_t i = 0; i < kTokens * 8; ++i) ids.push_back(i % 8);
    LowLatencyDispatchArgs args;
    args.x = {x.data(), DType::kBfloat16, {kTokens, kHidden}};
    args.topk_idx = {ids.data(), DType::kInt64, {kTokens, 8}};
    args.num_max_dispatch_tokens_per_rank = kTokens;
    args.num_experts = 8;
    args.use_fp8 = false;
    own.barrier();
    const auto before = nodes.traffic(own.rank());
    const NetworkCounts counts = buffer.network_counts();
    buffer.low_latency_dispatch(args);
    buffer.barrier();
    own.barrier();
    const std::int64_t row_bytes = buffer.network_counts().row_bytes - counts.row_bytes;
    EXPECT_EQ(buffer.network_counts().rows - counts.rows, kTokens);
    EXPECT_EQ(row_bytes, kTokens * kHidden * 2);
    const std::int64_t sent = nodes.traffic(own.rank()).sent - before.sent;
    EXPECT_GE(sent, row_bytes);
    EXPECT_LT(sent, row_bytes + row_bytes / 10);
    own.barrier();
  });
}

TEST(InternodeNodes, RanksOfOneNamespaceCanPoseAsMoreNodes) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(2);
  setenv("DEEP_EP_RANKS_PER_NODE", "1", 1);
  in_ranks(4, [&](Bootstrap& own) {
    net::live_on(nodes, own.rank() / 2);
    const std::shared_ptr<Bootstrap> bootstrap(std::shared_ptr<void>(), &own);
    Buffer buffer(bootstrap, {.timeout = std::chrono::seconds(20)});
    EXPECT_EQ(buffer.num_nodes(), 4);
    expect_right(buffer, case_of(buffer, 33, 256));
    own.barrier();
  });
  unsetenv("DEEP_EP_RANKS_PER_NODE");
}

// What the device of a node sends is what its rank gave to the network, and that is each token
// once.
TEST(InternodeNodes, NothingCrossesTwice) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(2);
  in_ranks(2, [&](Bootstrap& own) {
    net::live_on(nodes, own.rank());
    const std::shared_ptr<Bootstrap> bootstrap(std::shared_ptr<void>(), &own);
    Buffer buffer(bootstrap, {.timeout = std::chrono::seconds(20)});
    constexpr std::int64_t kTokens = 512;
    constexpr std::int64_t kHidden = 4096;
    const std::vector<float> x(kTokens * kHidden, 1.5F);
    const std::vector<std::int64_t> ids = [] {  // all four experts: every token goes to both ranks
      std::vector<std::int64_t> all;
      for (std::int64_t i = 0; i < kTokens * 4; ++i) all.push_back(i % 4);
      return all;
    }();
    const DispatchArgs args{.x = {x.data(), DType::kFloat32, {kTokens, kHidden}},
                            .num_experts = 4,
                            .topk_idx = {ids.data(), DType::kInt64, {kTokens, 4}}};
    own.barrier();
    const auto before = nodes.traffic(own.rank());
    const NetworkCounts counts = buffer.network_counts();
    buffer.dispatch(args);
    buffer.barrier();
    own.barrier();
    const std::int64_t row_bytes = buffer.network_counts().row_bytes - counts.row_bytes;
    EXPECT_EQ(buffer.network_counts().rows - counts.rows, kTokens);
    const std::int64_t payload = kTokens * (kHidden * 4 + 4 * 8);
    EXPECT_GE(row_bytes, payload);
    EXPECT_LT(row_bytes, payload + kTokens * 128);
    const std::int64_t sent = nodes.traffic(own.rank()).sent - before.sent;
    EXPECT_GE(sent, row_bytes);
    EXPECT_LT(sent, row_bytes + row_bytes / 10);
    own.barrier();
  });
}

TEST(InternodeNodes, AKilledRankIsNamedOnTheOtherNode) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(2);
  const auto exits = exits_of_ranks(4, [&](Bootstrap& own) {
    net::live_on(nodes, own.rank() / 2);
    const std::shared_ptr<Bootstrap> bootstrap(std::shared_ptr<void>(), &own);
    Buffer buffer(bootstrap, {.timeout = std::chrono::seconds(20)});
    buffer.barrier();
    if (own.rank() == 3) kill(getpid(), SIGKILL);
    try {
      for (int i = 0; i < 2; ++i) buffer.barrier();
      ADD_FAILURE() << "nobody missed rank 3";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kPeerFailed) << error.what();
      EXPECT_EQ(error.ranks(), std::vector{3}) << error.what();
    }
  });
  for (const RankExit& exit : exits)
    EXPECT_EQ(exit.status, exit.rank == 3 ? 128 + SIGKILL : 0) << "rank " << exit.rank;
}

}  // namespace
}  // namespace deep_ep
