#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <filesystem>
#include <sstream>
#include <thread>

#include "full.hpp"
#include "multi/fault_play.hpp"
#include "namespaces.hpp"
#include "verify/case.hpp"
#include "verify/low_latency_case.hpp"

// What may befall whole Buffers over nodes that are network namespaces, in the middle of a call:
// node 1 of three, of two ranks each, is cut off, turns slow, loses what it is sent, or dies.
namespace deep_ep::test {
namespace {

using net::Namespaces;
using Clock = std::chrono::steady_clock;
using std::chrono_literals::operator""s;
using std::chrono_literals::operator""ms;

constexpr int kNodes = 3;
constexpr int kRanksPerNode = 2;
constexpr int kRanks = kNodes * kRanksPerNode;
constexpr int kNode = 1;  // which it befalls
constexpr int kRank = 3;  // of that node
// A rank sends 1 MB to each other node, or more: at kRate a call takes longer than kLead.
constexpr std::int64_t kTokens = 256;
constexpr std::int64_t kHidden = 1024;
constexpr const char* kRate = "20mbit";
constexpr auto kLead = 300ms;
constexpr auto kJobLimit = 60s;

/// kSilent, kLoss: all is lost, and no device shows it. kAbsent: a rank does not come to the call.
enum class Trouble { kCable, kSilent, kLoss, kCrawl, kAbsent, kDeadRank, kDeadNode };

int node_of(int rank) { return rank / kRanksPerNode; }

struct Plan {
  Trouble trouble = Trouble::kCable;
  Op op = Op::kDispatch;

  std::string text() const {
    return fmt::format("{} {}", static_cast<int>(trouble), static_cast<int>(op));
  }
  static Plan parse(const std::string& text) {
    std::istringstream in(text);
    int trouble = 0;
    int op = 0;
    in >> trouble >> op;
    return {static_cast<Trouble>(trouble), static_cast<Op>(op)};
  }
  bool somebody_dies() const {
    return trouble == Trouble::kDeadRank || trouble == Trouble::kDeadNode;
  }
  bool cuts_off() const {
    return trouble == Trouble::kCable || trouble == Trouble::kSilent || trouble == Trouble::kLoss;
  }
  bool stays_away(int rank) const { return trouble == Trouble::kAbsent && rank == kRank; }
  bool dies(int rank) const {
    return rank == kRank ? somebody_dies()
                         : trouble == Trouble::kDeadNode && node_of(rank) == kNode;
  }
  /// Whether `rank` may miss all of these. Of what waits for each other across a cut both ends are
  /// suspect, and what others find may reach the node with the slow link.
  bool may_miss(const std::vector<int>& ranks, int rank) const {
    const auto cut = [&](int named) {
      return (node_of(named) == kNode) != (node_of(rank) == kNode);
    };
    if (trouble == Trouble::kCrawl && node_of(rank) == kNode) return !ranks.empty();
    if (cuts_off() || trouble == Trouble::kCrawl)
      return std::any_of(ranks.begin(), ranks.end(), cut);
    if (trouble == Trouble::kAbsent) return ranks == std::vector{kRank};
    return !ranks.empty() &&
           std::all_of(ranks.begin(), ranks.end(), [&](int named) { return dies(named); });
  }
  std::chrono::milliseconds timeout() const { return somebody_dies() ? 20s : 1500ms; }
  /// From the beginning of the call to its Error.
  std::chrono::milliseconds limit() const { return somebody_dies() ? 8s : timeout() + 5s; }
};

/// This rank's process lives on its node; it is forked outside of all.
void move_to_node(const Namespaces& nodes, int rank) {
  static bool moved = false;
  if (!moved) net::live_on(nodes, node_of(rank));
  moved = true;
}

/// A barrier. Returns kLead after the last rank came here, the same for all: they share the
/// machine's clock.
Clock::time_point agree_on_a_time(Bootstrap& bootstrap) {
  Clock::rep last = 0;
  for (const std::string& now :
       bootstrap.all_gather(std::to_string(Clock::now().time_since_epoch().count())))
    last = std::max<Clock::rep>(last, std::stoll(now));
  return Clock::time_point(Clock::duration(last)) + kLead;
}

/// Happens at `due`, to the whole play or to this rank.
std::thread begin_trouble(const Namespaces& nodes, const Plan& plan, int rank,
                          Clock::time_point due) {
  if (rank != 0 && !plan.dies(rank)) return {};
  return std::thread([&nodes, plan, rank, due] {
    std::this_thread::sleep_until(due);
    if (plan.dies(rank)) kill(getpid(), SIGKILL);
    if (plan.trouble == Trouble::kCable) nodes.set_link(kNode, false);
    if (plan.trouble == Trouble::kSilent) nodes.set_silent(kNode, true);
    if (plan.trouble == Trouble::kLoss) nodes.disturb(kNode, "loss 100%");
    // Less than a packet within the timeout.
    if (plan.trouble == Trouble::kCrawl) nodes.shape(kNode, "8kbit", "burst 10kb latency 50ms");
  });
}

void check_error(Findings& findings, const Plan& plan, int rank, const Thrown& thrown) {
  findings.expect(
      thrown.code == (plan.somebody_dies() ? ErrorCode::kPeerFailed : ErrorCode::kTimeout),
      fmt::format("code {}: {}", to_string(thrown.code), thrown.text));
  findings.expect(plan.may_miss(thrown.ranks, rank),
                  fmt::format("ranks() is {}: {}", fmt::join(thrown.ranks, ", "), thrown.text));
  findings.expect_contains(thrown.text, fmt::format("on rank {}", rank));
  findings.expect(thrown.after < plan.limit(),
                  fmt::format("the Error took {} ms", thrown.after.count()));
}

/// Whoever is left makes new Buffers.
void check_new_life(Findings& findings, Worker& worker, const Plan& plan) {
  std::vector<int> ranks;
  for (int rank = 0; rank < kRanks; ++rank)
    if (!plan.somebody_dies() || node_of(rank) != kNode) ranks.push_back(rank);
  if (std::find(ranks.begin(), ranks.end(), worker.rank()) != ranks.end())
    check_new_buffer(findings, worker, ranks);
}

void mend(const Namespaces& nodes, const Plan& plan) {
  nodes.set_link(kNode, true);
  // Refused to a port that has only just come up.
  if (plan.trouble == Trouble::kSilent) nodes.set_silent(kNode, false);
  nodes.smooth(kNode);
  // Else who is still being looked for from before is found to be missing soon, by new connections
  // too.
  for (int node = 0; node < kNodes; ++node)
    nodes.run(node, fmt::format("ip neigh flush dev {}", Namespaces::kDevice));
}

std::string play(const Namespaces& nodes, Worker& worker, const Plan& plan) {
  move_to_node(nodes, worker.rank());
  const Belongings before = Belongings::count();
  Findings findings;
  {
    Keepsakes kept;
    Buffer buffer(worker.bootstrap(),
                  {.num_rdma_bytes = Exchange::rdma_bytes(kRanks, kTokens, kHidden),
                   .low_latency_mode = true,
                   .timeout = 20s});
    kept.take(buffer);
    const Exchange exchange(worker.rank(), kRanks, kTokens, kHidden);
    const std::vector<float> x = exchange.x;
    const DispatchResult dispatched = buffer.dispatch(exchange.dispatch_args(buffer));
    const std::vector<float> got(dispatched.recv_x.as<float>(),
                                 dispatched.recv_x.as<float>() + dispatched.recv_x.numel());
    buffer.barrier();
    worker.bootstrap()->barrier();
    if (worker.rank() == 0) nodes.shape(kNode, kRate);
    const auto due = agree_on_a_time(*worker.bootstrap());
    buffer.set_timeout(plan.timeout());
    std::thread trouble = begin_trouble(nodes, plan, worker.rank(), due);
    const bool stays_away = plan.stays_away(worker.rank());
    if (stays_away) worker.bootstrap()->barrier();  // until the others have given it up
    const auto thrown = thrown_by([&] { exchange.run(buffer, plan.op, dispatched); });
    const bool too_soon = Clock::now() < due;
    if (trouble.joinable()) trouble.join();
    if (!thrown) return "no Error";
    findings.expect(!too_soon, fmt::format("too soon: {}", thrown->text));
    if (!stays_away) check_error(findings, plan, worker.rank(), *thrown);
    check_aftermath(findings, buffer, kept, *thrown, 8s);
    if (plan.trouble == Trouble::kAbsent && !stays_away) worker.bootstrap()->barrier();
    findings.expect(exchange.x == x, "the caller's rows have changed");
    findings.expect(std::equal(got.begin(), got.end(), dispatched.recv_x.as<float>()),
                    "the results of an earlier dispatch have changed");
  }
  check_belongings(findings, before);
  if (!plan.somebody_dies()) worker.bootstrap()->barrier();
  if (worker.rank() == 0) mend(nodes, plan);
  if (!plan.somebody_dies()) worker.bootstrap()->barrier();
  check_new_life(findings, worker, plan);
  return findings.text();
}

class InternodeFault : public testing::TestWithParam<Op> {
 protected:
  void SetUp() override { NEEDS_NAMESPACES(); }

  static void run(Trouble trouble) {
    const Plan plan{trouble, GetParam()};
    const Namespaces nodes(kNodes);
    {
      Pool pool(kRanks, [&nodes](Worker& worker, const std::string& job) {
        return play(nodes, worker, Plan::parse(job));
      });
      const auto outcomes = pool.run(kRanks, plan.text(), kJobLimit);
      for (int rank = 0; rank < kRanks; ++rank) {
        const Outcome& outcome = outcomes[static_cast<std::size_t>(rank)];
        if (plan.dies(rank)) {
          EXPECT_EQ(outcome.signal, SIGKILL) << "rank " << rank << ": " << outcome.answer;
          continue;
        }
        EXPECT_TRUE(outcome.answered && outcome.answer.empty())
            << "rank " << rank << ": "
            << (outcome.timed_out ? "hangs" : outcome.answer + outcome.failure);
      }
    }
    expect_nothing_left(nodes);
  }

  static void expect_nothing_left(const Namespaces& nodes) {
    EXPECT_THAT(nodes.inhabitants(), testing::IsEmpty());
    EXPECT_TRUE(waitpid(-1, nullptr, WNOHANG) == -1 && errno == ECHILD) << "a child is left";
    for (const auto& entry : std::filesystem::directory_iterator("/dev/shm"))
      EXPECT_EQ(entry.path().string().find("deep_ep"), std::string::npos) << entry.path();
  }
};

TEST_P(InternodeFault, ANodeWhoseCableIsPulledIsNamedAfterTheTimeout) { run(Trouble::kCable); }

TEST_P(InternodeFault, ANodeWhosePacketsAreAllLostIsNamedAfterTheTimeout) {
  if (const std::string why = net::why_no_netem(); !why.empty()) GTEST_SKIP() << why;
  run(Trouble::kLoss);
}

TEST_P(InternodeFault, ANodeThatTurnsTooSlowEndsTheCallAfterTheTimeout) { run(Trouble::kCrawl); }

TEST_P(InternodeFault, AKilledRankIsNamedByAll) { run(Trouble::kDeadRank); }

TEST_P(InternodeFault, ANodeWhoseRanksAreKilledIsNamedByAll) { run(Trouble::kDeadNode); }

std::string name_of(const testing::TestParamInfo<Op>& op) {
  constexpr std::array kNames{"Barrier", "Dispatch",   "CachedDispatch",
                              "Combine", "CombineOwn", "LowLatency"};
  return kNames[static_cast<std::size_t>(op.param)];
}

INSTANTIATE_TEST_SUITE_P(BetweenNodes, InternodeFault,
                         testing::Values(Op::kDispatch, Op::kCombine, Op::kLowLatency), name_of);

/// Of those that know from before what comes.
class InternodeFaultByHandle : public InternodeFault {};

TEST_P(InternodeFaultByHandle, ANodeThatFallsSilentIsNamedAfterTheTimeout) {
  run(Trouble::kSilent);
}

TEST_P(InternodeFaultByHandle, ARankThatStaysAwayIsNamedAfterTheTimeout) { run(Trouble::kAbsent); }

TEST_P(InternodeFaultByHandle, AKilledRankIsNamedByAll) { run(Trouble::kDeadRank); }

INSTANTIATE_TEST_SUITE_P(BetweenNodes, InternodeFaultByHandle,
                         testing::ValuesIn(wants_full()
                                               ? std::vector{Op::kCachedDispatch, Op::kCombine}
                                               : std::vector{Op::kCachedDispatch}),
                         name_of);

/// Of either mode.
template <class Case>
Case case_of_all() {
  Case c;
  c.ranks = kRanks;
  c.ranks_per_node = kRanksPerNode;
  c.experts = 4 * kRanks;
  c.tokens = {kTokens};
  c.hidden = 2 * kHidden;
  return c;
}

/// Calls of both modes, all results checked. True if they are right.
bool exchange_all(Buffer& buffer, const verify::LowLatencyCase& low) {
  verify::CaseResult result = verify::run_case(buffer, case_of_all<verify::Case>());
  result.merge(verify::run_case(buffer, low));
  EXPECT_TRUE(result.passed()) << result.first_mismatch;
  return result.passed() && result.checked_elements > 0;
}

/// All results are right while `trouble` befalls node 1, at once with the calls.
void expect_right(const std::function<void(const Namespaces&)>& trouble) {
  const Namespaces nodes(kNodes);
  const auto exits = run_forked(kRanks, [&](const std::shared_ptr<Bootstrap>& bootstrap) {
    net::live_on(nodes, node_of(bootstrap->rank()));
    const auto low = case_of_all<verify::LowLatencyCase>();
    Buffer buffer(bootstrap,
                  {.num_rdma_bytes = low.buffer_bytes(), .low_latency_mode = true, .timeout = 20s});
    buffer.barrier();
    bootstrap->barrier();
    std::thread act;
    if (bootstrap->rank() == 0) act = std::thread([&] { trouble(nodes); });
    const bool right = exchange_all(buffer, low);
    if (act.joinable()) act.join();
    bootstrap->barrier();
    return right && !testing::Test::HasFailure() ? 0 : 1;
  });
  for (const RankExit& exit : exits) EXPECT_EQ(exit.status, 0) << "rank " << exit.rank;
}

TEST(TroubleBetweenNodes, ANodeThatTurnsSlowHoldsUpAllAndNothingIsWrong) {
  NEEDS_NAMESPACES();
  expect_right([](const Namespaces& nodes) {
    const auto await_bytes = [&](std::int64_t bytes) {
      const std::int64_t end = nodes.traffic(kNode).received + bytes;
      while (nodes.traffic(kNode).received < end) std::this_thread::sleep_for(1ms);
    };
    await_bytes(1'000'000);
    nodes.shape(kNode, "40mbit", "burst 64kb latency 50ms");
    const auto begin = std::chrono::steady_clock::now();
    await_bytes(3'000'000);
    EXPECT_GE(std::chrono::steady_clock::now() - begin, 500ms);
  });
}

/// A dispatch by its handle, to which rank kRank comes late by kLead: every row as it was sent.
bool dispatch_with_a_late_rank(const std::shared_ptr<Bootstrap>& bootstrap) {
  constexpr std::int64_t kMany = 1024;  // 4 MiB to each node: more than the rings hold
  Buffer buffer(bootstrap, {.timeout = 20s});
  const Exchange exchange(bootstrap->rank(), kRanks, kMany, kHidden);
  const DispatchResult first = buffer.dispatch(exchange.dispatch_args(buffer));
  buffer.barrier();
  const auto due = agree_on_a_time(*bootstrap);
  if (bootstrap->rank() == kRank) std::this_thread::sleep_until(due);
  const DispatchResult got = buffer.dispatch(Exchange::cached_args(exchange, first));
  EXPECT_GE(Clock::now(), due) << "nobody has all rows before all have come";
  EXPECT_EQ(got.recv_x.shape[0], kRanks * kMany);
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < got.recv_x.numel(); ++i) {
    const std::int64_t source = i / (kMany * kHidden);
    wrong += got.recv_x.as<float>()[i] != static_cast<float>(1 + source) ? 1 : 0;
  }
  EXPECT_EQ(wrong, 0) << "of " << got.recv_x.numel() << " elements";
  bootstrap->barrier();
  return !testing::Test::HasFailure();
}

TEST(TroubleBetweenNodes, ARankThatIsLateForADispatchByHandleHoldsUpAllAndNothingIsWrong) {
  NEEDS_NAMESPACES();
  const Namespaces nodes(kNodes);
  const auto exits = run_forked(kRanks, [&](const std::shared_ptr<Bootstrap>& bootstrap) {
    net::live_on(nodes, node_of(bootstrap->rank()));
    return dispatch_with_a_late_rank(bootstrap) ? 0 : 1;
  });
  for (const RankExit& exit : exits) EXPECT_EQ(exit.status, 0) << "rank " << exit.rank;
}

TEST(TroubleBetweenNodes, ANetworkWithoutRoomLosesPacketsAndNothingIsWrong) {
  NEEDS_NAMESPACES();
  expect_right(
      [](const Namespaces& nodes) { nodes.shape(kNode, "200mbit", "burst 20kb limit 40kb"); });
}

TEST(TroubleBetweenNodes, ANetworkThatIsSilentForAMomentCostsNothingButTime) {
  NEEDS_NAMESPACES();
  expect_right([](const Namespaces& nodes) {
    nodes.shape(kNode, "100mbit");
    for (int i = 0; i < 3; ++i) {
      std::this_thread::sleep_for(100ms);
      nodes.set_silent(kNode, true);
      std::this_thread::sleep_for(200ms);
      nodes.set_silent(kNode, false);
    }
  });
}

TEST(TroubleBetweenNodes, DelayAndLossCostNothingButTime) {
  if (const std::string why = net::why_no_netem(); !why.empty()) GTEST_SKIP() << why;
  expect_right([](const Namespaces& nodes) { nodes.disturb(kNode, "delay 3ms 2ms loss 1%"); });
}

}  // namespace
}  // namespace deep_ep::test
