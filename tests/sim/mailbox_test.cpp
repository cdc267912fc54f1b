#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

#include "baton_scheduler.hpp"
#include "protocol/barrier.hpp"
#include "protocol/host_waiter.hpp"
#include "seeds.hpp"

namespace deep_ep::sim {
namespace {

using namespace protocol;

constexpr std::chrono::milliseconds kTimeout(20);  // 20,000 turns

// A value is written and read word by word, with schedule points in between, so that one which is
// overwritten meanwhile shows as torn.
constexpr int kWords = 4;
using Value = std::array<std::uint64_t, kWords>;

void write_slowly(Value& to, std::uint64_t word) {
  for (std::uint64_t& part : to) {
    part = word;
    schedule_point(Point::kCopy);
  }
}

// How many words of `from` are not `word`, each looked at in another turn.
int wrong_words(const Value& from, std::uint64_t word) {
  int wrong = 0;
  for (const std::uint64_t& part : from) {
    wrong += part != word;
    schedule_point(Point::kCopy);
  }
  return wrong;
}

// Mailboxes: at every epoch each rank posts a value to all, waits for all, and reads what came. The
// flags and values of epoch e lie in box e mod `boxes`.

struct MailboxWorld {
  MailboxWorld(int num_ranks, int num_boxes)
      : ranks(num_ranks),
        boxes(num_boxes),
        doorbell(num_ranks),
        fault(num_ranks),
        posted(num_ranks * num_boxes * num_ranks),
        value(posted.size()) {}

  std::size_t at(int owner, std::uint64_t epoch, int source) const {
    return (static_cast<std::size_t>(owner) * boxes + epoch % boxes) * ranks + source;
  }

  int ranks;
  int boxes;
  std::vector<Doorbell> doorbell;
  std::vector<FaultRecord> fault;
  std::vector<EpochFlag> posted;
  std::vector<Value> value;
  int wrong = 0;
};

std::uint64_t value_of(std::uint64_t epoch, int source) { return epoch * 100 + source + 1; }

WaitResult exchange(MailboxWorld& world, int me, std::uint64_t epoch) {
  HostWaiter waiter(world.doorbell[me], world.fault[me], kTimeout, true);
  for (int i = 0; i < world.ranks; ++i) {
    const int peer = (me + i) % world.ranks;
    write_slowly(world.value[world.at(peer, epoch, me)], value_of(epoch, me));
    world.posted[world.at(peer, epoch, me)].publish(epoch);
    world.doorbell[peer].ring();
  }
  const EpochFlag* posted = &world.posted[world.at(me, epoch, 0)];
  const WaitResult result =
      wait_until(waiter, [&] { return all_reached(posted, world.ranks, epoch); });
  if (result != WaitResult::kReady) return result;
  for (int source = 0; source < world.ranks; ++source)
    world.wrong += wrong_words(world.value[world.at(me, epoch, source)], value_of(epoch, source));
  return WaitResult::kReady;
}

// Wrong words over all ranks after `epochs` exchanges.
int wrong_in_exchanges(std::uint64_t seed, int boxes) {
  MailboxWorld world(2 + static_cast<int>(seed % 4), boxes);
  std::vector<std::function<void()>> ranks;
  for (int rank = 0; rank < world.ranks; ++rank) {
    ranks.push_back([&world, rank] {
      for (std::uint64_t epoch = 1; epoch <= 20; ++epoch)
        EXPECT_EQ(exchange(world, rank, epoch), WaitResult::kReady);
    });
  }
  BatonScheduler scheduler(seed);
  scheduler.run(ranks);
  return world.wrong;
}

TEST(Mailbox, TwoBoxesKeepEveryValueUntilItIsRead) {
  for_each_seed(200, [](std::uint64_t seed) { EXPECT_EQ(wrong_in_exchanges(seed, 2), 0); });
}

// Shows that the check above can fail.
TEST(Mailbox, OneBoxIsOverwrittenBeforeItIsRead) {
  int overwritten = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) overwritten += wrong_in_exchanges(seed, 1) != 0;
  EXPECT_GT(overwritten, 0);
}

}  // namespace
}  // namespace deep_ep::sim
