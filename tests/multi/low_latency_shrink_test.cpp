#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "deep_ep/deep_ep.hpp"
#include "in_ranks.hpp"
#include "processes.hpp"

// With enable_shrink, ranks that go or do not come are left out, and the others go on.
namespace deep_ep {
namespace {

using std::chrono_literals::operator""ms;

constexpr int kRanks = 4;
constexpr int kLost = 2;
constexpr std::int64_t kTokens = 5;
constexpr std::int64_t kHidden = 64;
constexpr int kCallsBefore = 3;
constexpr int kCallsAfter = 6;
constexpr std::chrono::milliseconds kPatience{20'000};

struct Input {
  std::vector<std::uint16_t> x = std::vector<std::uint16_t>(kTokens * kHidden, 0x3f80);  // 1
  std::vector<float> weights = std::vector<float>(kTokens * kRanks, 1.0f);
  std::vector<std::int64_t> ids;
  explicit Input(int without = -1) {
    for (std::int64_t token = 0; token < kTokens; ++token)
      for (int rank = 0; rank < kRanks; ++rank) ids.push_back(rank == without ? -1 : rank);
  }
};

LowLatencyDispatchResult dispatch(Buffer& buffer, const Input& input) {
  LowLatencyDispatchArgs args;
  args.x = {input.x.data(), DType::kBfloat16, {kTokens, kHidden}};
  args.topk_idx = {input.ids.data(), DType::kInt64, {kTokens, kRanks}};
  args.num_max_dispatch_tokens_per_rank = static_cast<int>(kTokens);
  args.num_experts = kRanks;
  args.use_fp8 = false;
  return buffer.low_latency_dispatch(args);
}

Tensor combine(Buffer& buffer, const Input& input, const LowLatencyDispatchResult& got) {
  LowLatencyCombineArgs args;
  args.x = got.recv_x;
  args.topk_idx = {input.ids.data(), DType::kInt64, {kTokens, kRanks}};
  args.topk_weights = {input.weights.data(), DType::kFloat32, {kTokens, kRanks}};
  args.handle = got.handle;
  return buffer.low_latency_combine(args).combined_x;
}

/// Every rank adds 1 to every token. Of those that dispatch so many are here when rows come home.
void exchange(Buffer& buffer, const Input& input, int ranks_here, int ranks_home) {
  const LowLatencyDispatchResult got = dispatch(buffer, input);
  EXPECT_EQ(got.recv_count.as<std::int32_t>()[0], ranks_here * kTokens);
  for (int source = 0; source < kRanks; ++source) {
    const std::int64_t range = got.handle.layout_range.as<std::int64_t>()[source];
    const bool here = ranks_here == kRanks || source != kLost;
    EXPECT_EQ(range & 0xffffffff, here ? kTokens : 0) << "source " << source;
  }
  const Tensor sums = combine(buffer, input, got);
  const std::uint16_t expected = ranks_home == kRanks ? 0x4080 : 0x4040;
  for (std::int64_t i = 0; i < sums.numel(); ++i)
    ASSERT_EQ(sums.as<std::uint16_t>()[i], expected) << i;
}

void exchange(Buffer& buffer, const Input& input, int ranks_here) {
  exchange(buffer, input, ranks_here, ranks_here);
}

BufferOptions options_of(std::chrono::milliseconds timeout) {
  BufferOptions options;
  options.enable_shrink = options.low_latency_mode = true;
  options.num_threads = 1;
  options.timeout = timeout;
  options.num_rdma_bytes =
      Buffer::get_low_latency_rdma_size_hint(static_cast<int>(kTokens), kHidden, kRanks, kRanks);
  return options;
}

void expect_masks(Buffer& buffer, const std::vector<std::int32_t>& expected) {
  std::vector<std::int32_t> masks(kRanks, 7);
  buffer.low_latency_query_mask_buffer({masks.data(), DType::kInt32, {kRanks}});
  EXPECT_EQ(masks, expected) << "on rank " << buffer.rank();
  buffer.check();  // no fault
}
void expect_one_lost(Buffer& buffer) { expect_masks(buffer, {0, 0, 1, 0}); }

void play(Bootstrap& bootstrap, const std::shared_ptr<Bootstrap>& shared, bool dies) {
  Buffer buffer(shared, options_of(kPatience));
  const Input input;
  for (int i = 0; i < kCallsBefore; ++i) exchange(buffer, input, kRanks);
  if (!dies) buffer.set_timeout(3000ms);
  if (bootstrap.rank() == kLost) {
    if (dies) kill(getpid(), SIGKILL);
    usleep(6'000'000);
    _exit(0);
  }
  for (int i = 0; i < kCallsAfter; ++i) exchange(buffer, input, kRanks - 1);
  expect_one_lost(buffer);
}

/// Stops this process a while from now.
void stop_soon() {
  (void)std::signal(SIGALRM, [](int) { (void)raise(SIGSTOP); });
  ualarm(500'000, 0);
}

/// A rank is stopped while it waits for rank 0, and says so for ever; the others wait for it then.
void play_stopped(const std::shared_ptr<Bootstrap>& bootstrap) {
  Buffer buffer(bootstrap, options_of(kPatience));
  const Input input;
  exchange(buffer, input, kRanks);
  const std::vector<std::string> pids = bootstrap->all_gather(std::to_string(getpid()));
  buffer.set_timeout(3000ms);
  if (bootstrap->rank() == 0) {
    while (!is_stopped(pids[kLost])) usleep(10'000);
  }
  if (bootstrap->rank() == kLost) stop_soon();
  exchange(buffer, input, kRanks, kRanks - 1);
  for (int i = 0; i < kCallsAfter; ++i) exchange(buffer, input, kRanks - 1);
  expect_one_lost(buffer);
  if (bootstrap->rank() != 0) return;
  std::this_thread::sleep_for(1000ms);  // the others are done, too
  kill(std::stoi(pids[kLost]), SIGKILL);
}

/// The same in a combine; rank 1 has no token for the stopped rank and goes on, to wait for those
/// that wait for that one, and has `work` to do before.
void play_stopped_for_others(const std::shared_ptr<Bootstrap>& bootstrap,
                             std::chrono::milliseconds work) {
  constexpr int kUnneeding = 1;
  Buffer buffer(bootstrap, options_of(kPatience));
  const Input input(bootstrap->rank() == kUnneeding ? kLost : -1);
  (void)combine(buffer, input, dispatch(buffer, input));
  const LowLatencyDispatchResult got = dispatch(buffer, input);
  const std::vector<std::string> pids = bootstrap->all_gather(std::to_string(getpid()));
  buffer.set_timeout(2000ms);
  if (bootstrap->rank() == 0) {
    while (!is_stopped(pids[kLost])) usleep(10'000);
  }
  if (bootstrap->rank() == kLost) stop_soon();
  (void)combine(buffer, input, got);
  for (int i = 0; i < 4; ++i) {
    std::this_thread::sleep_for(bootstrap->rank() == kUnneeding ? work : 50ms);
    (void)combine(buffer, input, dispatch(buffer, input));
  }
  expect_one_lost(buffer);
  if (bootstrap->rank() != 0) return;
  std::this_thread::sleep_for(1000ms);  // the others are done, too
  kill(std::stoi(pids[kLost]), SIGKILL);
}

/// Of so many ranks a node; 0: all are of one.
void play_all(bool dies, int ranks_per_node) {
  if (ranks_per_node > 0)
    setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(ranks_per_node).c_str(), 1);
  const auto exits = run_forked(kRanks, [dies](const std::shared_ptr<Bootstrap>& bootstrap) {
    play(*bootstrap, bootstrap, dies);
    return testing::Test::HasFailure() ? 1 : 0;
  });
  unsetenv("DEEP_EP_RANKS_PER_NODE");
  for (const RankExit& exit : exits)
    EXPECT_EQ(exit.status, exit.rank == kLost && dies ? 128 + SIGKILL : 0) << "rank " << exit.rank;
}

TEST(LowLatencyShrink, TheOthersGoOnWithoutARankThatDied) { play_all(true, 0); }
TEST(LowLatencyShrink, TheOthersGoOnWithoutARankThatDoesNotCome) { play_all(false, 0); }

void expect_one_stopped(const std::function<void(const std::shared_ptr<Bootstrap>&)>& body) {
  const auto exits = run_forked(kRanks, [&](const std::shared_ptr<Bootstrap>& bootstrap) {
    body(bootstrap);
    return testing::Test::HasFailure() ? 1 : 0;
  });
  for (const RankExit& exit : exits)
    EXPECT_EQ(exit.status, exit.rank == kLost ? 128 + SIGKILL : 0) << "rank " << exit.rank;
}

TEST(LowLatencyShrink, ARankThatIsStoppedInAWaitTakesNobodyAlong) {
  expect_one_stopped(play_stopped);
}
TEST(LowLatencyShrink, NorThoseWhoWaitForThoseWhoWaitForIt) {
  for (const auto work : {50ms, 300ms})
    expect_one_stopped([work](const auto& bootstrap) { play_stopped_for_others(bootstrap, work); });
}

#if defined(DEEP_EP_HAS_UCX)
TEST(LowLatencyShrink, BetweenNodesTheOthersGoOnWithoutARankThatDied) {
  play_all(true, 2);
  play_all(true, 1);
}
TEST(LowLatencyShrink, BetweenNodesTheOthersGoOnWithoutARankThatDoesNotCome) { play_all(false, 2); }

// Rank 3 is late for who has just lost a rank of either node.
TEST(LowLatencyShrink, BetweenNodesWhoIsLateIsNotTakenForTheDead) {
  setenv("DEEP_EP_RANKS_PER_NODE", "2", 1);
  const auto dies = [](int rank) { return rank == 1 || rank == 2; };
  const auto exits = run_forked(kRanks, [&](const std::shared_ptr<Bootstrap>& bootstrap) {
    Buffer buffer(bootstrap, options_of(kPatience));
    const Input input;
    exchange(buffer, input, kRanks);
    bootstrap->barrier();
    if (dies(bootstrap->rank())) kill(getpid(), SIGKILL);
    if (bootstrap->rank() == 3) std::this_thread::sleep_for(1500ms);
    (void)combine(buffer, input, dispatch(buffer, input));
    expect_masks(buffer, {0, 1, 1, 0});
    if (bootstrap->rank() == 0) std::this_thread::sleep_for(1000ms);  // rank 3 has looked, too
    return testing::Test::HasFailure() ? 1 : 0;
  });
  unsetenv("DEEP_EP_RANKS_PER_NODE");
  for (const RankExit& exit : exits)
    EXPECT_EQ(exit.status, dies(exit.rank) ? 128 + SIGKILL : 0) << "rank " << exit.rank;
}
#endif

}  // namespace
}  // namespace deep_ep
