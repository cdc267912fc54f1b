#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/trace.hpp"
#include "deep_ep/deep_ep.hpp"
#include "modes/internode.hpp"
#include "protocol/rail.hpp"
#include "refusal.hpp"

// The functions that each public call must go through with several nodes, and what the network is
// given for it. Two ranks, threads of this process, pose as two nodes.

namespace deep_ep {
namespace {

using testing::ElementsAre;
using Steps = std::vector<std::string>;

constexpr int kRanks = 2;
thread_local Steps* recorded = nullptr;

/// The steps that this thread takes in `body`.
Steps steps_of(const std::function<void()>& body) {
  Steps steps;
  recorded = &steps;
  body();
  recorded = nullptr;
  return steps;
}

/// Runs `body` on each of two ranks; `boot` is its bootstrap.
void on_nodes(const std::function<void(int rank, std::shared_ptr<Bootstrap> boot)>& body) {
  trace::set_hook([](std::string_view name) {
    if (recorded != nullptr) recorded->emplace_back(name);
  });
  setenv("DEEP_EP_RANKS_PER_NODE", "1", 1);
  const auto bootstraps = bootstrap_threads(kRanks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank)
    threads.emplace_back([&, rank] { body(rank, bootstraps[rank]); });
  for (std::thread& thread : threads) thread.join();
  unsetenv("DEEP_EP_RANKS_PER_NODE");
  trace::set_hook({});
}

/// Four tokens: to rank 0, to rank 1, to both, to none.
struct Inputs {
  std::vector<float> x = std::vector<float>(4 * 8, 2.0F);
  std::vector<std::int64_t> topk_idx{0, -1, 1, 1, 0, 1, -1, -1};

  DispatchArgs args(Buffer& buffer) const {
    DispatchArgs args;
    args.x = {x.data(), DType::kFloat32, {4, 8}};
    args.topk_idx = {topk_idx.data(), DType::kInt64, {4, 2}};
    args.layout = buffer.get_dispatch_layout(args.topk_idx, 2);
    return args;
  }
};

TEST(InternodeCallChain, ABufferJoinsTheOtherNodesAndLeavesThem) {
  on_nodes([](int, const std::shared_ptr<Bootstrap>& boot) {
    std::unique_ptr<Buffer> buffer;
    EXPECT_THAT(
        steps_of([&] { buffer = std::make_unique<Buffer>(boot, BufferOptions{.num_threads = 1}); }),
        ElementsAre("Buffer::Buffer", "allocate", "export_handles", "Buffer::sync", "open_handles",
                    "internode::init", "internode::alloc"));
    EXPECT_EQ(buffer->num_nodes(), 2);
    EXPECT_EQ(buffer->num_ranks_per_node(), 1);
    boot->barrier();
    EXPECT_THAT(steps_of([&] { buffer.reset(); }),
                ElementsAre("Buffer::~Buffer", "synchronize", "internode::free", "release",
                            "internode::finalize"));
  });
}

TEST(InternodeCallChain, CallsTakeTheStepsOfTheirMode) {
  on_nodes([](int, const std::shared_ptr<Bootstrap>& boot) {
    Buffer buffer(boot, {.num_threads = 1});
    const Inputs inputs;
    const DispatchArgs args = inputs.args(buffer);
    DispatchResult dispatched;
    EXPECT_THAT(steps_of([&] { dispatched = buffer.dispatch(args); }),
                ElementsAre("Buffer::internode_dispatch", "internode::notify_dispatch",
                            "internode::dispatch"));
    DispatchArgs cached{.x = args.x, .internode_handle = dispatched.internode_handle};
    EXPECT_THAT(steps_of([&] { buffer.internode_dispatch(cached); }),
                ElementsAre("Buffer::internode_dispatch", "internode::dispatch"));
    DispatchArgs own = args;
    own.layout = {};
    own.num_experts = 2;
    own.num_worst_tokens = 8;
    EXPECT_THAT(steps_of([&] { buffer.dispatch(own); }),
                ElementsAre("Buffer::internode_dispatch", "internode::get_dispatch_layout",
                            "internode::notify_dispatch", "internode::dispatch"));
    DispatchArgs grouped = args;
    EXPECT_THAT(steps_of([&] { grouped.prepared = buffer.prepare_dispatch(args); }),
                ElementsAre("Buffer::prepare_dispatch", "internode::notify_dispatch"));
    grouped.group_rows = true;
    DispatchResult by_expert;
    EXPECT_THAT(
        steps_of([&] { by_expert = buffer.dispatch(grouped); }),
        ElementsAre("Buffer::internode_dispatch", "internode::dispatch", "intranode::group_rows"));
    EXPECT_THAT(steps_of([&] {
                  buffer.combine({.x = by_expert.grouped_x,
                                  .groups = by_expert.groups,
                                  .internode_handle = by_expert.internode_handle});
                }),
                ElementsAre("Buffer::internode_combine", "intranode::reduce_rows",
                            "internode::cached_notify", "internode::combine"));
    CombineArgs back{.x = dispatched.recv_x, .internode_handle = dispatched.internode_handle};
    const Steps combine{"Buffer::internode_combine", "internode::cached_notify",
                        "internode::combine"};
    EXPECT_EQ(steps_of([&] { buffer.combine(back); }), combine);
    EXPECT_EQ(steps_of([&] { buffer.internode_combine(back); }), combine);
    EXPECT_THAT(steps_of([&] { buffer.barrier(); }), testing::Contains("internode::barrier"));
    boot->barrier();
  });
}

TEST(InternodeCallChain, EveryTokenCrossesOnceForEachOtherNodeAndNothingElseDoes) {
  on_nodes([](int rank, const std::shared_ptr<Bootstrap>& boot) {
    Buffer buffer(boot, {.num_threads = 1});
    const Inputs inputs;
    const DispatchArgs args = inputs.args(buffer);
    const NetworkCounts before = buffer.network_counts();
    const DispatchResult dispatched = buffer.dispatch(args);
    const NetworkCounts after = buffer.network_counts();
    // Two of the four tokens go to the other node, in records of one size.
    const plan::RecordFormat record({.x_bytes = 32, .topk_idx_bytes = 16}, 1);
    EXPECT_EQ(args.layout.num_tokens_per_rdma_rank.as<std::int32_t>()[1 - rank], 2);
    EXPECT_EQ(after.rows - before.rows, 2);
    EXPECT_EQ(after.row_bytes - before.row_bytes, 2 * record.bytes);
    // Beside the counts that the ranks exchange ahead.
    const std::int64_t message = sizeof(protocol::RailMessage) + 4 * 1;
    EXPECT_EQ(after.put_bytes - before.put_bytes, 2 * record.bytes + message);
    boot->barrier();
    const NetworkCounts before_combine = buffer.network_counts();
    buffer.combine({.x = dispatched.recv_x, .internode_handle = dispatched.internode_handle});
    const NetworkCounts combined = buffer.network_counts();
    EXPECT_EQ(combined.rows - before_combine.rows, 2);
    EXPECT_EQ(combined.row_bytes - before_combine.row_bytes, 2 * 64);
    EXPECT_EQ(combined.put_bytes - before_combine.put_bytes,
              2 * 64 + static_cast<std::int64_t>(sizeof(protocol::RailMessage)));
    boot->barrier();
  });
}

TEST(InternodeCallChain, CallsForOneNodeAreRefusedAndTouchNobody) {
  on_nodes([](int, const std::shared_ptr<Bootstrap>& boot) {
    Buffer buffer(boot, {.num_threads = 1});
    const Inputs inputs;
    const DispatchArgs args = inputs.args(buffer);
    for (const auto& call : std::vector<std::function<void()>>{
             [&] { buffer.intranode_dispatch(args); }, [&] { buffer.intranode_combine({}); }}) {
      EXPECT_THAT(refusal(call, ErrorCode::kUnsupported),
                  testing::HasSubstr("the 2 ranks are of 2 nodes of 1"));
    }
    for (const auto& call : std::vector<std::function<void()>>{
             [&] { buffer.low_latency_dispatch({}); }, [&] { buffer.low_latency_combine({}); },
             [&] { buffer.clean_low_latency_buffer(1, 8, 2); }}) {
      EXPECT_THAT(refusal(call, ErrorCode::kUnsupported),
                  testing::HasSubstr("made with low_latency_mode"));
    }
    buffer.dispatch(args);
    boot->barrier();
  });
}

/// The four tokens of Inputs, in low latency.
struct LowLatencyInputs {
  std::vector<std::uint16_t> x = std::vector<std::uint16_t>(4 * 8, 0x3f80);
  std::vector<std::int64_t> topk_idx = Inputs().topk_idx;
  std::vector<float> weights = std::vector<float>(4 * 2, 1.0F);

  static BufferOptions options() {
    return {.num_rdma_bytes = Buffer::get_low_latency_rdma_size_hint(4, 8, kRanks, kRanks, 2),
            .low_latency_mode = true,
            .num_threads = 1};
  }
  LowLatencyDispatchArgs dispatch_args() const {
    LowLatencyDispatchArgs args;
    args.x = {x.data(), DType::kBfloat16, {4, 8}};
    args.topk_idx = {topk_idx.data(), DType::kInt64, {4, 2}};
    args.num_max_dispatch_tokens_per_rank = 4;
    args.num_experts = kRanks;
    args.use_fp8 = false;
    return args;
  }
  LowLatencyCombineArgs combine_args(const LowLatencyDispatchResult& dispatched) const {
    LowLatencyCombineArgs args;
    args.x = dispatched.recv_x;
    args.topk_idx = {topk_idx.data(), DType::kInt64, {4, 2}};
    args.topk_weights = {weights.data(), DType::kFloat32, {4, 2}};
    args.handle = dispatched.handle;
    return args;
  }
};

TEST(InternodeCallChain, LowLatencyTakesItsOwnSteps) {
  on_nodes([](int, const std::shared_ptr<Bootstrap>& boot) {
    Buffer buffer(boot, LowLatencyInputs::options());
    const LowLatencyInputs inputs;
    EXPECT_THAT(
        steps_of([&] { buffer.clean_low_latency_buffer(4, 8, kRanks); }),
        ElementsAre("Buffer::clean_low_latency_buffer", "internode_ll::clean_low_latency_buffer"));
    LowLatencyDispatchResult got;
    EXPECT_THAT(steps_of([&] { got = buffer.low_latency_dispatch(inputs.dispatch_args()); }),
                ElementsAre("Buffer::low_latency_dispatch", "internode_ll::dispatch"));
    LowLatencyCombineArgs combine = inputs.combine_args(got);
    combine.return_recv_hook = true;
    LowLatencyCombineResult sums;
    EXPECT_THAT(steps_of([&] { sums = buffer.low_latency_combine(combine); }),
                ElementsAre("Buffer::low_latency_combine", "internode_ll::combine"));
    EXPECT_THAT(steps_of([&] { sums.recv_hook(); }), ElementsAre("internode_ll::combine"));
    boot->barrier();
  });
}

TEST(InternodeCallChain, RanksAgreeOnLowLatency) {
  on_nodes([](int rank, const std::shared_ptr<Bootstrap>& boot) {
    BufferOptions options = LowLatencyInputs::options();
    options.low_latency_mode = rank == 0;
    EXPECT_THAT(refusal([&] { const Buffer buffer(boot, options); }, ErrorCode::kDisagreement),
                testing::HasSubstr("low_latency_mode is 1 on rank 0 and 0 on rank 1"));
  });
}

TEST(InternodeCallChain, ALowLatencyRowCrossesOnceForEachRankOfAnotherNode) {
  on_nodes([](int, const std::shared_ptr<Bootstrap>& boot) {
    Buffer buffer(boot, LowLatencyInputs::options());
    const LowLatencyInputs inputs;
    const NetworkCounts before = buffer.network_counts();
    const LowLatencyDispatchResult got = buffer.low_latency_dispatch(inputs.dispatch_args());
    const NetworkCounts dispatched = buffer.network_counts();
    // Two of the four tokens go to the other rank: heads, rows, counts and the call are a put each.
    EXPECT_EQ(dispatched.rows - before.rows, 2);
    EXPECT_EQ(dispatched.row_bytes - before.row_bytes, 2 * 16);
    EXPECT_EQ(dispatched.puts - before.puts, 4);
    buffer.low_latency_combine(inputs.combine_args(got));
    const NetworkCounts combined = buffer.network_counts();
    // Weights and the call, then sums and their heads.
    EXPECT_EQ(combined.rows - dispatched.rows, 2);
    EXPECT_EQ(combined.puts - dispatched.puts, 4);
    boot->barrier();
  });
}

TEST(InternodeCallChain, CallsForSeveralNodesAreRefusedOnOne) {
  Buffer buffer(bootstrap_threads(1)[0], {.num_threads = 1});
  EXPECT_EQ(buffer.num_nodes(), 1);
  EXPECT_THAT(refusal([&] { buffer.internode_dispatch({}); }, ErrorCode::kUnsupported),
              testing::HasSubstr("all ranks are of one node"));
  EXPECT_THAT(refusal([&] { buffer.internode_combine({}); }, ErrorCode::kUnsupported),
              testing::HasSubstr("all ranks are of one node"));
}

TEST(InternodeCallChain, SourceMetaIsAsLongAsAHandlesRows) {
  on_nodes([](int, const std::shared_ptr<Bootstrap>& boot) {
    Buffer buffer(boot, {.num_threads = 1});
    const DispatchResult dispatched = buffer.dispatch(Inputs().args(buffer));
    EXPECT_EQ(dispatched.internode_handle.recv_src_meta.shape[1],
              internode::get_source_meta_bytes());
    boot->barrier();
  });
}

}  // namespace
}  // namespace deep_ep
