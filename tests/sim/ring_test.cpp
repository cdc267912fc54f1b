#include "protocol/ring.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <random>
#include <vector>

#include "baton_scheduler.hpp"
#include "protocol/host_waiter.hpp"
#include "protocol/wait.hpp"
#include "seeds.hpp"

namespace deep_ep::sim {
namespace {

using namespace protocol;

constexpr std::chrono::milliseconds kTimeout(20);  // 20,000 turns

// A ring between two ranks: calls with record sizes and row counts of their own follow each other.

struct RingProgram {
  struct Call {
    int size;
    int rows;
  };
  std::vector<Call> calls;
  std::int64_t ring_bytes;

  explicit RingProgram(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    ring_bytes = 64 + static_cast<std::int64_t>(random() % 64);
    for (int i = 0; i < 12; ++i)
      calls.push_back(
          {1 + static_cast<int>(random() % (ring_bytes / 4)), static_cast<int>(random() % 12)});
  }
};

struct RingWorld {
  Doorbell doorbell[2]{};
  FaultRecord fault[2]{};
  EpochFlag tail{}, head{};
  std::vector<std::byte> data;
};

WaitResult send_rows(RingWorld& world, const RingProgram& program, std::uint64_t seed) {
  std::mt19937_64 random(seed + 1);
  RingSender sender{{program.ring_bytes}, world.data.data(), &world.tail, &world.head, 0, 0};
  HostWaiter waiter(world.doorbell[0], world.fault[0], kTimeout, true);
  int next = 0;
  const auto publish = [&] {
    sender.publish();
    world.doorbell[1].ring();
  };
  for (const auto& call : program.calls) {
    for (int row = 0; row < call.rows; ++row) {
      std::byte* place = sender.reserve(call.size);
      if (place == nullptr) {
        publish();
        const WaitResult result =
            wait_until(waiter, [&] { return (place = sender.reserve(call.size)) != nullptr; });
        if (result != WaitResult::kReady) return result;
      }
      ++next;
      for (int i = 0; i < call.size; ++i) {
        place[i] = static_cast<std::byte>(next);
        if (i % 4 == 0) schedule_point(Point::kCopy);
      }
      sender.advance(call.size);
      if (random() % 3 == 0) publish();
    }
    publish();
  }
  return WaitResult::kReady;
}

WaitResult receive_rows(RingWorld& world, const RingProgram& program, int& wrong) {
  RingReceiver receiver{{program.ring_bytes}, world.data.data(), &world.tail, &world.head, 0, 0};
  HostWaiter waiter(world.doorbell[1], world.fault[1], kTimeout, true);
  int next = 0;
  for (const auto& call : program.calls) {
    for (int row = 0; row < call.rows; ++row) {
      const std::byte* place = receiver.peek(call.size);
      if (place == nullptr) {
        receiver.release();
        world.doorbell[0].ring();
        const WaitResult result =
            wait_until(waiter, [&] { return (place = receiver.peek(call.size)) != nullptr; });
        if (result != WaitResult::kReady) return result;
      }
      ++next;
      for (int i = 0; i < call.size; ++i) {
        wrong += place[i] != static_cast<std::byte>(next);
        if (i % 4 == 0) schedule_point(Point::kCopy);
      }
      receiver.advance(call.size);
    }
    receiver.release();
    world.doorbell[0].ring();
  }
  return WaitResult::kReady;
}

TEST(Ring, NoRowIsLostTornOrOverwrittenBeforeItIsRead) {
  for_each_seed(300, [](std::uint64_t seed) {
    const RingProgram program(seed);
    RingWorld world;
    world.data.resize(program.ring_bytes);
    int wrong = 0;
    BatonScheduler scheduler(seed);
    scheduler.run({[&] { EXPECT_EQ(send_rows(world, program, seed), WaitResult::kReady); },
                   [&] { EXPECT_EQ(receive_rows(world, program, wrong), WaitResult::kReady); }});
    EXPECT_EQ(wrong, 0);
  });
}

}  // namespace
}  // namespace deep_ep::sim
