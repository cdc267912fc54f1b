#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/trace.hpp"
#include "deep_ep/deep_ep.hpp"

// The functions that each public call must go through, under their documented names.

namespace deep_ep {
namespace {

using testing::ElementsAre;
using Steps = std::vector<std::string>;

/// The steps that this thread takes; calls may take some on the Buffer's worker thread.
class CallChain : public testing::Test {
 protected:
  void SetUp() override {
    trace::set_hook([this](std::string_view name) {
      const std::lock_guard lock(mutex_);
      steps_.emplace_back(name);
    });
  }
  void TearDown() override { trace::set_hook({}); }

  Steps take_steps() {
    const std::lock_guard lock(mutex_);
    return std::exchange(steps_, {});
  }

  static std::unique_ptr<Buffer> make_buffer() {
    BufferOptions options;
    options.num_threads = 1;
    return std::make_unique<Buffer>(bootstrap_threads(1)[0], options);
  }

 private:
  std::mutex mutex_;
  Steps steps_;
};

struct Inputs {
  std::vector<float> x = std::vector<float>(3 * 8, 2.0F);
  std::vector<std::int64_t> topk_idx{0, 1, 1, 0, -1, 1};

  DispatchArgs args(Buffer& buffer) const {
    DispatchArgs args;
    args.x = {x.data(), DType::kFloat32, {3, 8}};
    args.topk_idx = {topk_idx.data(), DType::kInt64, {3, 2}};
    args.layout = buffer.get_dispatch_layout(args.topk_idx, 2);
    return args;
  }
};

CombineArgs combine_args(const DispatchResult& dispatched) {
  CombineArgs args;
  args.x = dispatched.recv_x;
  args.handle = dispatched.handle;
  return args;
}

TEST_F(CallChain, ABufferAllocatesExportsAndSyncs) {
  const auto buffer = make_buffer();
  EXPECT_THAT(take_steps(), ElementsAre("Buffer::Buffer", "allocate", "export_handles",
                                        "Buffer::sync", "open_handles", "internode::init"));
}

TEST_F(CallChain, ADestructorSynchronizesAndReleases) {
  auto buffer = make_buffer();
  take_steps();
  buffer.reset();
  EXPECT_THAT(take_steps(),
              ElementsAre("Buffer::~Buffer", "synchronize", "release", "internode::finalize"));
}

TEST_F(CallChain, LayoutServesAllModes) {
  const auto buffer = make_buffer();
  const std::vector<std::int64_t> topk_idx{0, 1};
  take_steps();
  buffer->get_dispatch_layout({topk_idx.data(), DType::kInt64, {1, 2}}, 2);
  EXPECT_THAT(take_steps(), ElementsAre("internode::get_dispatch_layout"));
}

TEST_F(CallChain, DispatchNotifiesThenDispatches) {
  const auto buffer = make_buffer();
  const Inputs inputs;
  const DispatchArgs args = inputs.args(*buffer);
  take_steps();
  buffer->dispatch(args);
  const Steps expected{"Buffer::intranode_dispatch", "intranode::notify_dispatch",
                       "intranode::dispatch"};
  EXPECT_EQ(take_steps(), expected);
  buffer->intranode_dispatch(args);
  EXPECT_EQ(take_steps(), expected);
}

TEST_F(CallChain, DispatchFindsTheLayoutItselfIfToldTheExperts) {
  const auto buffer = make_buffer();
  const Inputs inputs;
  DispatchArgs args = inputs.args(*buffer);
  args.layout = {};
  args.num_experts = 2;
  take_steps();
  for (const std::int64_t num_worst_tokens : {0, 5}) {
    args.num_worst_tokens = num_worst_tokens;
    buffer->dispatch(args);
    EXPECT_THAT(take_steps(),
                ElementsAre("Buffer::intranode_dispatch", "internode::get_dispatch_layout",
                            "intranode::notify_dispatch", "intranode::dispatch"));
  }
}

TEST_F(CallChain, ACachedDispatchSkipsTheNotification) {
  const auto buffer = make_buffer();
  const Inputs inputs;
  const DispatchArgs args = inputs.args(*buffer);
  DispatchArgs cached;
  cached.x = args.x;
  cached.handle = buffer->dispatch(args).handle;
  take_steps();
  buffer->dispatch(cached);
  EXPECT_THAT(take_steps(), ElementsAre("Buffer::intranode_dispatch", "intranode::dispatch"));
}

TEST_F(CallChain, CombineNotifiesThenCombines) {
  const auto buffer = make_buffer();
  const Inputs inputs;
  const DispatchResult dispatched = buffer->dispatch(inputs.args(*buffer));
  take_steps();
  buffer->combine(combine_args(dispatched));
  const Steps expected{"Buffer::intranode_combine", "intranode::cached_notify_combine",
                       "intranode::combine"};
  EXPECT_EQ(take_steps(), expected);
  buffer->intranode_combine(combine_args(dispatched));
  EXPECT_EQ(take_steps(), expected);
}

TEST_F(CallChain, APreparedDispatchIsNotifiedBefore) {
  const auto buffer = make_buffer();
  const Inputs inputs;
  DispatchArgs args = inputs.args(*buffer);
  take_steps();
  args.prepared = buffer->prepare_dispatch(args);
  EXPECT_THAT(take_steps(), ElementsAre("Buffer::prepare_dispatch", "intranode::notify_dispatch"));
  buffer->dispatch(args);
  EXPECT_THAT(take_steps(), ElementsAre("Buffer::intranode_dispatch", "intranode::dispatch"));
}

TEST_F(CallChain, RowsAreGroupedBehindADispatchAndReducedBeforeACombine) {
  const auto buffer = make_buffer();
  const Inputs inputs;
  DispatchArgs args = inputs.args(*buffer);
  args.group_rows = true;
  take_steps();
  const DispatchResult dispatched = buffer->dispatch(args);
  EXPECT_THAT(take_steps(), ElementsAre("Buffer::intranode_dispatch", "intranode::notify_dispatch",
                                        "intranode::dispatch", "intranode::group_rows"));
  CombineArgs back = combine_args(dispatched);
  back.x = dispatched.grouped_x;
  back.groups = dispatched.groups;
  buffer->combine(back);
  EXPECT_THAT(take_steps(), ElementsAre("Buffer::intranode_combine", "intranode::reduce_rows",
                                        "intranode::cached_notify_combine", "intranode::combine"));
}

TEST_F(CallChain, TheBarrierIsTheModes) {
  const auto buffer = make_buffer();
  take_steps();
  buffer->barrier();
  EXPECT_THAT(take_steps(), testing::Contains("intranode::barrier"));
}

}  // namespace
}  // namespace deep_ep
