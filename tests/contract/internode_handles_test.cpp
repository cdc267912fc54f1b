// Handles and counts of several nodes that do not fit what the ranks send: found before a row is
// written where it must not be. The ranks are threads.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>

#include "deep_ep/buffer.hpp"
#include "deep_ep/error.hpp"

namespace deep_ep {
namespace {

constexpr int kRanks = 4;
constexpr std::int64_t kHidden = 8;

/// Runs `body` on each of two nodes of two ranks.
void on_nodes(const std::function<void(Buffer& buffer, Bootstrap& ranks)>& body) {
  setenv("DEEP_EP_RANKS_PER_NODE", "2", 1);
  const auto bootstraps = bootstrap_threads(kRanks);
  std::vector<std::thread> threads;
  for (const auto& bootstrap : bootstraps)
    threads.emplace_back([&body, bootstrap] {
      Buffer buffer(bootstrap, {.num_threads = 1});
      body(buffer, *bootstrap);
      bootstrap->barrier();
    });
  for (std::thread& thread : threads) thread.join();
  unsetenv("DEEP_EP_RANKS_PER_NODE");
}

/// Every rank sends each of its two tokens to all ranks.
struct Inputs {
  std::vector<float> x = std::vector<float>(2 * kHidden, 3.0F);
  std::vector<std::int64_t> topk_idx{0, 1, 2, 3, 0, 1, 2, 3};

  DispatchArgs args() const {
    DispatchArgs args;
    args.x = {x.data(), DType::kFloat32, {2, kHidden}};
    args.topk_idx = {topk_idx.data(), DType::kInt64, {2, kRanks}};
    args.num_experts = kRanks;
    return args;
  }
};
constexpr std::int64_t kRows = 2 * kRanks;

Error refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return {ErrorCode::kUsage, ""};
}

/// A dispatch for which rank 0 has changed what was prepared; what rank 0 says of it.
std::string changed(const std::function<void(PreparedDispatch&)>& change) {
  std::string text;
  on_nodes([&](Buffer& buffer, Bootstrap& ranks) {
    const Inputs inputs;
    DispatchArgs args = inputs.args();
    args.prepared = buffer.prepare_dispatch(args);
    if (buffer.rank() == 0) change(*args.prepared);
    ranks.barrier();  // nobody is still in the call before
    const Error error = refusal([&] { buffer.dispatch(args); });
    if (buffer.rank() == 0) text = error.what();
    EXPECT_NE(error.code(), ErrorCode::kTimeout) << error.what();
  });
  return text;
}

TEST(InternodeHandles, CountsThatWerePreparedServeAnyNumberOfTimes) {
  on_nodes([](Buffer& buffer, Bootstrap&) {
    const Inputs inputs;
    DispatchArgs args = inputs.args();
    const DispatchResult plain = buffer.dispatch(args);
    args.prepared = buffer.prepare_dispatch(args);
    EXPECT_EQ(args.prepared->num_recv_tokens, kRows);
    EXPECT_EQ(args.prepared->num_rdma_recv_tokens, kRows / 2);
    for (int round = 0; round < 3; ++round) {
      const DispatchResult got = buffer.dispatch(args);
      EXPECT_EQ(std::memcmp(got.recv_x.data, plain.recv_x.data, plain.recv_x.nbytes()), 0);
      const Tensor& heads = got.internode_handle.send_nvl_head;
      EXPECT_EQ(std::memcmp(heads.data, plain.internode_handle.send_nvl_head.data, heads.nbytes()),
                0);
    }
  });
}

TEST(InternodeHandles, TooSmallCountsAreRefused) {
  EXPECT_THAT(changed([](PreparedDispatch& prepared) { --prepared.num_recv_tokens; }),
              testing::HasSubstr("has 7 rows, but 8 were received"));
  EXPECT_THAT(changed([](PreparedDispatch& prepared) { --prepared.num_rdma_recv_tokens; }),
              testing::HasSubstr("send_nvl_head has 3 rows, but 4 were received"));
  EXPECT_THAT(changed([](PreparedDispatch& prepared) { prepared.num_rdma_recv_tokens = -1; }),
              testing::HasSubstr("prepared.num_rdma_recv_tokens is -1"));
}

TEST(InternodeHandles, CountsOfAnotherRoutingAreRefused) {
  EXPECT_THAT(changed([](PreparedDispatch& prepared) {
                prepared.internode_handle.is_token_in_rank.as<bool>()[1] = false;
                prepared.internode_handle.is_token_in_rank.as<bool>()[0] = false;
              }),
              testing::HasSubstr("send_rdma_head[0, 0] is 0, must be -1"));
  EXPECT_THAT(
      changed([](PreparedDispatch& prepared) {
        prepared.internode_handle.recv_gbl_rank_prefix_sum.as<std::int32_t>()[1] -= 1;
      }),
      testing::HasSubstr("recv_gbl_rank_prefix_sum[1] on rank 0 says 3, what the ranks send"));
  EXPECT_THAT(changed([](PreparedDispatch& prepared) { prepared.internode_handle = {}; }),
              testing::HasSubstr("internode_handle.is_token_in_rank is"));
}

TEST(InternodeHandles, NothingIsWrittenBehindResultsThatAreTooShort) {
  on_nodes([](Buffer& buffer, Bootstrap& ranks) {
    const Inputs inputs;
    DispatchArgs args = inputs.args();
    args.prepared = buffer.prepare_dispatch(args);
    // Peers write to it directly.
    const DispatchResult earlier = buffer.dispatch(args);
    std::memset(earlier.recv_x.data, 0, earlier.recv_x.nbytes());
    args.recv_x = earlier.recv_x;
    if (buffer.rank() == 0) args.prepared->num_recv_tokens = 5;
    ranks.barrier();
    const Error error = refusal([&] { buffer.dispatch(args); });
    EXPECT_NE(error.code(), ErrorCode::kTimeout) << error.what();
    if (buffer.rank() != 0) return;
    for (std::int64_t i = 5 * kHidden; i < kRows * kHidden; ++i)
      EXPECT_EQ(earlier.recv_x.as<float>()[i], 0.0F) << i;
  });
}

}  // namespace
}  // namespace deep_ep
