#include "deep_ep/event.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>

#include "base/event_state.hpp"
#include "deep_ep/error.hpp"

namespace deep_ep {
namespace {

/// A point that is reached, or fails, when the test says so.
class FakePoint final : public EventState {
 public:
  bool reached = false;
  bool failed = false;
  int stream_waits = 0;
  void* last_stream = nullptr;

  void stream_wait(Stream stream) override {
    ++stream_waits;
    last_stream = stream.native;
    host_wait();
  }
  void host_wait() override {
    if (failed) throw Error(ErrorCode::kTimeout, "the call failed", {2});
  }
  bool query() override { return reached || failed; }
};

TEST(EventHandle, OnTheHostANewEventIsComplete) {
  const EventHandle event;
  EXPECT_TRUE(event.query());
  EXPECT_NO_THROW(event.host_wait());
  EXPECT_NO_THROW(event.current_stream_wait());
  EXPECT_TRUE(EventHandle(Stream{}).query());
}

TEST(EventHandle, CopiesReferToTheSamePoint) {
  const auto point = std::make_shared<FakePoint>();
  const EventHandle event(point);
  const EventHandle copy = event;  // NOLINT(performance-unnecessary-copy-initialization)
  EXPECT_FALSE(copy.query());
  point->reached = true;
  EXPECT_TRUE(event.query());
  EXPECT_TRUE(copy.query());
  EXPECT_EQ(copy.state(), point);
}

TEST(EventHandle, WaitsThrowTheErrorOfTheCall) {
  const auto point = std::make_shared<FakePoint>();
  point->failed = true;
  const EventHandle event(point);
  EXPECT_TRUE(event.query());
  for (int i = 0; i < 2; ++i) {
    EXPECT_THROW(event.host_wait(), Error);
    EXPECT_THROW(event.current_stream_wait(), Error);
  }
}

TEST(EventHandle, AStreamWaitNamesTheStream) {
  const auto point = std::make_shared<FakePoint>();
  int stream = 0;
  EventHandle(point).current_stream_wait(Stream{&stream});
  EXPECT_EQ(point->stream_waits, 1);
  EXPECT_EQ(point->last_stream, &stream);
}

TEST(EventHandle, RecordMovesOnlyThisHandle) {
  const auto point = std::make_shared<FakePoint>();
  EventHandle event(point);
  const EventHandle copy = event;  // NOLINT(performance-unnecessary-copy-initialization)
  event.record();
  EXPECT_TRUE(event.query());
  EXPECT_FALSE(copy.query());
}

}  // namespace
}  // namespace deep_ep
