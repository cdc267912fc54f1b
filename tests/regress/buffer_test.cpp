#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/event_state.hpp"
#include "deep_ep/deep_ep.hpp"

namespace deep_ep {
namespace {

using testing::HasSubstr;

constexpr std::int64_t kTokens = 8;

/// One rank's input: every token goes to every rank.
struct Input {
  std::vector<float> x = std::vector<float>(kTokens * 32, 1.0F);
  std::vector<std::int32_t> topk_idx;

  explicit Input(int num_ranks) {
    for (std::int64_t token = 0; token < kTokens; ++token) {
      for (int rank = 0; rank < num_ranks; ++rank) topk_idx.push_back(rank);
    }
  }
  DispatchArgs args(Buffer& buffer, std::int64_t hidden = 32) const {
    const int ranks = buffer.num_ranks();
    DispatchArgs args;
    args.x = {x.data(), DType::kFloat32, {kTokens, hidden}};
    args.topk_idx = {topk_idx.data(), DType::kInt32, {kTokens, ranks}};
    args.layout = buffer.get_dispatch_layout(args.topk_idx, ranks);
    return args;
  }
};

void run_ranks(int num_ranks, const std::function<void(std::shared_ptr<Bootstrap>)>& main) {
  const auto bootstraps = bootstrap_threads(num_ranks);
  std::vector<std::thread> threads;
  for (const auto& bootstrap : bootstraps) threads.emplace_back(main, bootstrap);
  for (std::thread& thread : threads) thread.join();
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no Error";
}

/// Whose ranks have not all come.
class ShortAnswer final : public Bootstrap {
 public:
  int rank() const override { return 1; }
  int size() const override { return 2; }
  std::vector<std::string> all_gather(std::string_view) override { return {"+0"}; }
};

// Elements that were not there were read.
TEST(Regress, AnAllGatherWithoutAllRanksIsRefused) {
  EXPECT_THAT(error_of([] { Buffer(std::make_shared<ShortAnswer>()); }),
              HasSubstr("all_gather returned 1 elements, must be one for each of 2 ranks"));
}

// In nanoseconds it overflowed, and every wait ended at once.
TEST(Regress, ATimeoutWithoutEndIsRefusedWhereverItIsGiven) {
  constexpr auto kEndless = std::chrono::milliseconds::max();
  constexpr std::chrono::milliseconds kYear = std::chrono::hours(365 * 24);
  Buffer buffer(bootstrap_threads(1)[0], {.timeout = kYear});
  buffer.barrier();
  for (const auto bad : {kEndless, kYear + std::chrono::milliseconds(1), -kYear}) {
    const std::string named = "timeout is " + std::to_string(bad.count()) + " ms, must be from";
    for (const std::function<void()>& call : std::vector<std::function<void()>>{
             [&] { Buffer(bootstrap_threads(1)[0], {.timeout = bad}); },
             [&] { buffer.set_timeout(bad); }, [&] { (void)bootstrap_threads(2, bad); },
             [&] { (void)bootstrap_tcp(0, 2, "127.0.0.1", 29477, bad); }})
      EXPECT_THAT(error_of(call), HasSubstr(named));
  }
  EXPECT_EQ(buffer.timeout(), kYear);
  buffer.barrier();
}

// The handle's matrices had a column for each of num_sms / 2 channels: 2^30 of them, 8 GiB.
TEST(Regress, AHugeNumSmsDoesNotMakeAHugeHandle) {
  Buffer buffer(bootstrap_threads(1)[0]);
  const Input input(1);
  DispatchArgs args = input.args(buffer);
  args.config.num_sms = INT_MAX;
  const DispatchResult dispatched = buffer.dispatch(args);
  EXPECT_LT(dispatched.handle.channel_prefix_matrix.nbytes(), std::size_t{1} << 20);
  EXPECT_EQ(dispatched.num_recv_tokens, kTokens);
}

// On GPUs every rank wrote bookkeeping to where no rank had placed any.
TEST(Regress, APreparedHandleWithoutAColumnIsRefused) {
  Buffer buffer(bootstrap_threads(1)[0]);
  const Input input(1);
  DispatchArgs args = input.args(buffer);
  PreparedDispatch prepared = buffer.prepare_dispatch(args);
  prepared.handle.channel_prefix_matrix.shape[1] = 0;
  args.layout = {};
  args.prepared = prepared;
  EXPECT_THAT(
      error_of([&] { buffer.dispatch(args); }),
      HasSubstr("handle.channel_prefix_matrix is int32[1, 0], it needs at least one column"));
}

// Stores past the caches, which so many rows take, crashed at such addresses.
TEST(Regress, OutputsMayBeginAnywhere) {
  constexpr std::int64_t kRows = 512, kBytes = 16384;
  Buffer buffer(bootstrap_threads(1)[0]);
  std::vector<std::uint8_t> x(kRows * kBytes);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint8_t>(i * 7 + i / 253);
  const std::vector<std::int32_t> ids(kRows, 0);
  const Tensor memory = buffer.allocate_mapped(kRows * kBytes + 16);
  DispatchArgs args;
  args.x = {x.data(), DType::kUint8, {kRows, kBytes}};
  args.topk_idx = {ids.data(), DType::kInt32, {kRows, 1}};
  args.layout = buffer.get_dispatch_layout(args.topk_idx, 1);
  args.group_rows = true;
  args.num_worst_tokens = kRows;
  std::vector<std::uint8_t> grouped(x.size() + 16);
  for (const int offset : {1, 8, 15}) {
    args.recv_x = {memory.as<std::uint8_t>() + offset, DType::kUint8, {kRows, kBytes}};
    args.grouped_x = {grouped.data() + offset, DType::kUint8, {kRows, kBytes}};
    const DispatchResult result = buffer.dispatch(args);
    EXPECT_EQ(std::memcmp(result.recv_x.data, x.data(), x.size()), 0) << offset;
    EXPECT_EQ(std::memcmp(result.grouped_x.data, x.data(), x.size()), 0) << offset;
  }
}

// Each took its own size for where the other's outputs are staged, and summed other rows.
TEST(Regress, InboxesOfSizesThatRoundToTheSameAreNotTheSame) {
  const auto exits = run_forked(2, [](const std::shared_ptr<Bootstrap>& bootstrap) {
    setenv("DEEP_EP_INBOX_BYTES", bootstrap->rank() == 0 ? "65536" : "131072", 1);
    try {
      Buffer buffer(bootstrap);
    } catch (const Error& error) {
      return error.code() == ErrorCode::kDisagreement ? 0 : 2;
    }
    return 1;
  });
  for (const RankExit& exit : exits) EXPECT_EQ(exit.status, 0) << "rank " << exit.rank;
}

// The child waited for threads that a fork does not copy.
TEST(Regress, AForkedChildDropsItsCopy) {
  const std::shared_ptr<Bootstrap> bootstrap = bootstrap_threads(1)[0];
  BufferOptions options;
  options.num_threads = 2;
  auto buffer = std::make_unique<Buffer>(bootstrap, options);
  const Input input(1);
  DispatchArgs args = input.args(*buffer);
  args.options.async_finish = true;
  buffer->dispatch(args).event.host_wait();
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    buffer.reset();
    std::_Exit(0);
  }
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  args.options.async_finish = false;
  EXPECT_EQ(buffer->dispatch(args).num_recv_tokens, kTokens);
}

// The call went on in memory that was gone.
TEST(Regress, ACallEndsWhenItsBufferIsDestroyedMeanwhile) {
  run_ranks(2, [](const std::shared_ptr<Bootstrap>& bootstrap) {
    using std::chrono_literals::operator""s;
    BufferOptions options;
    options.timeout = 100s;
    Buffer buffer(bootstrap, options);
    const Input input(2);
    const DispatchArgs args = input.args(buffer);
    const auto begin = std::chrono::steady_clock::now();
    if (bootstrap->rank() == 0) {
      std::thread caller([&] {
        // Rank 1 does not come.
        EXPECT_THAT(error_of([&] { buffer.dispatch(args); }), HasSubstr("is destroyed while"));
      });
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      buffer.destroy();
      caller.join();
      EXPECT_THAT(error_of([&] { buffer.barrier(); }), HasSubstr("the Buffer is destroyed"));
    }
    bootstrap->barrier();
    if (bootstrap->rank() == 1) {
      EXPECT_THAT(error_of([&] { buffer.barrier(); }), HasSubstr("is destroyed while"));
    }
    EXPECT_LT(std::chrono::steady_clock::now() - begin, 50s);
  });
}

// The others were told "has destroyed its Buffer" when they saw the end before the reason.
TEST(Regress, WhoRefusesAndLeavesAtOnceIsKnownForTheReason) {
  for (int round = 0; round < 20; ++round) {
    run_ranks(2, [](const std::shared_ptr<Bootstrap>& bootstrap) {
      Buffer buffer(bootstrap);
      const Input input(2);
      DispatchArgs args = input.args(buffer);
      bootstrap->barrier();
      if (bootstrap->rank() == 1) args.config.num_sms = 0;
      EXPECT_THAT(error_of([&] { buffer.dispatch(args); }), HasSubstr("num_sms is 0"));
    });
  }
}

// Each rank found the disagreement by itself, but later calls threw what another one had reported.
TEST(Regress, LaterCallsThrowWhatTheFailedCallThrew) {
  for (int round = 0; round < 20; ++round) {
    run_ranks(3, [](const std::shared_ptr<Bootstrap>& bootstrap) {
      Buffer buffer(bootstrap);
      const Input input(3);
      const DispatchArgs args = input.args(buffer, bootstrap->rank() == 1 ? 16 : 32);
      const std::string first = error_of([&] { buffer.dispatch(args); });
      EXPECT_THAT(first, HasSubstr("hidden"));
      if (first.find("reported") != std::string::npos) return;  // it names the present call
      EXPECT_EQ(error_of([&] { buffer.barrier(); }), first);
      EXPECT_EQ(error_of([&] { buffer.check(); }), first);
    });
  }
}

// The rows went past the end of the block, which had been made for the handle's length.
TEST(Regress, AHandleThatIsShorterThanItsRowsIsRefused) {
  Buffer buffer(bootstrap_threads(1)[0]);
  const Input input(1);
  DispatchArgs args = input.args(buffer);
  IntranodeHandle handle = buffer.dispatch(args).handle;
  handle.recv_src_idx.shape[0] -= 1;
  DispatchArgs cached;
  cached.x = args.x;
  cached.handle = handle;
  EXPECT_THAT(error_of([&] { buffer.dispatch(cached); }), HasSubstr("room for 7 rows"));
}

// All of rank 1's arrays are empty, and where they point is nobody's business.
TEST(Regress, ARankWithoutRowsGroupsAndReducesNothing) {
  run_ranks(2, [](const std::shared_ptr<Bootstrap>& bootstrap) {
    Buffer buffer(bootstrap);
    const Input input(2);
    const std::vector<std::int32_t> to_rank_zero(kTokens * 2, 0);
    DispatchArgs args;
    args.x = {input.x.data(), DType::kFloat32, {kTokens, 32}};
    args.topk_idx = {to_rank_zero.data(), DType::kInt32, {kTokens, 2}};
    args.num_experts = 2;
    args.expert_alignment = 4;
    args.group_rows = true;
    args.prepared = buffer.prepare_dispatch(args);
    DispatchResult got = buffer.dispatch(args);
    const bool first = buffer.rank() == 0;
    // Every token names expert 0 twice: room for two rows, one row.
    EXPECT_EQ(got.num_recv_tokens, first ? 2 * kTokens : 0);
    EXPECT_EQ(got.grouped_x.shape[0], first ? 4 * kTokens : 0);
    EXPECT_EQ(got.groups.group_offsets.as<std::int32_t>()[1], first ? 4 * kTokens : 0);
    for (Tensor* tensor :
         {&got.grouped_x, &got.groups.grouped_rows, &got.groups.recv_rows, &got.recv_x})
      if (!first) tensor->data = nullptr;
    CombineArgs back;
    back.x = got.grouped_x;
    back.handle = got.handle;
    back.groups = got.groups;
    const CombineResult out = buffer.combine(back);
    for (std::int64_t i = 0; i < kTokens * 32; ++i) EXPECT_EQ(out.combined_x.as<float>()[i], 1.0F);
  });
}

/// Happens when the test says so.
class Gate final : public EventState {
 public:
  void stream_wait(Stream) override { host_wait(); }
  void host_wait() override { open.wait(false); }
  bool query() override { return open; }
  std::atomic<bool> open{false};
};

// It said "a queued call".
TEST(Regress, AQueuedCallThatMeetsAFaultSaysWhichItIs) {
  const auto gate = std::make_shared<Gate>();
  run_ranks(2, [&](const std::shared_ptr<Bootstrap>& bootstrap) {
    Buffer buffer(bootstrap);
    const Input input(2);
    const DispatchResult got = buffer.dispatch(input.args(buffer));
    CombineArgs back;
    back.x = got.recv_x;
    back.handle = got.handle;
    if (bootstrap->rank() == 1) {
      bootstrap->barrier();
      back.config.num_sms = 0;
      EXPECT_THAT(error_of([&] { buffer.combine(back); }), HasSubstr("num_sms"));
    } else {
      back.options.async_finish = true;
      back.options.previous_event = EventHandle(gate);
      const CombineResult sums = buffer.combine(back);
      bootstrap->barrier();  // it is queued when rank 1 refuses its part
      while (error_of([&] { buffer.check(); }) == "no Error") std::this_thread::yield();
      gate->open = true;
      gate->open.notify_all();
      EXPECT_THAT(error_of([&] { sums.event.host_wait(); }),
                  HasSubstr("intranode_combine on rank 0: rank 1 reported: num_sms is 0"));
    }
    bootstrap->barrier();
  });
}

}  // namespace
}  // namespace deep_ep
