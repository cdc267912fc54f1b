#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <sstream>
#include <thread>

#include "full.hpp"
#include "multi/fault_play.hpp"
#include "protocol/schedule.hpp"

// A rank dies or sleeps at any point of a call: all others must end with an Error that names it.

namespace deep_ep::test {
namespace {

using std::chrono_literals::operator""s;
using std::chrono_literals::operator""ms;

constexpr int kRanks = 4;
constexpr std::int64_t kInboxBytes = 4 << 20;
constexpr auto kJobLimit = 60s;

enum class Act { kKill, kStop, kKillAfterMicroseconds };

/// What happens to the victim, and when.
struct Plan {
  std::string combine = "auto";  ///< DEEP_EP_COMBINE
  std::int64_t inbox_bytes = kInboxBytes;
  Op op = Op::kBarrier;
  Act act = Act::kKill;
  protocol::Point point = protocol::Point::kPublish;
  int count = 1;  ///< at the count-th such point; or after so many microseconds
  int victim = 0;
  int timeout_ms = 10'000;
  int ranks_per_node = 0;

  std::string text() const {
    return fmt::format("{} {} {} {} {} {} {} {} {}", static_cast<int>(op), static_cast<int>(act),
                       static_cast<int>(point), count, victim, timeout_ms, combine, inbox_bytes,
                       ranks_per_node);
  }
  static Plan parse(const std::string& text) {
    std::istringstream in(text);
    int op = 0;
    int act = 0;
    int point = 0;
    Plan plan;
    in >> op >> act >> point >> plan.count >> plan.victim >> plan.timeout_ms >> plan.combine >>
        plan.inbox_bytes >> plan.ranks_per_node;
    plan.op = static_cast<Op>(op);
    plan.act = static_cast<Act>(act);
    plan.point = static_cast<protocol::Point>(point);
    return plan;
  }
};

/// How many ranks have given up the victim of the present job. All processes share it.
std::atomic<int>& given_up() {
  static void* const shared = mmap(nullptr, sizeof(std::atomic<int>), PROT_READ | PROT_WRITE,
                                   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return *static_cast<std::atomic<int>*>(shared);
}

/// Stops all threads of this process; a child wakes it once the others have given it up.
void stop_self() {
  const pid_t self = getpid();
  const pid_t child = fork();
  if (child == 0) {
    kill(self, SIGSTOP);
    for (int i = 0; i < 20'000 && given_up() < kRanks - 1; ++i) usleep(1000);
    kill(self, SIGCONT);
    _exit(0);
  }
  waitpid(child, nullptr, 0);
}

/// Lets its process die or stop at one point of a call.
class Executioner final : public protocol::Scheduler {
 public:
  explicit Executioner(const Plan& plan) : plan_(plan) {}

  void reach(protocol::Point point) override {
    if (point == protocol::Point::kWait) sched_yield();  // waits do not sleep under a scheduler
    if (point != plan_.point || ++reached_ != plan_.count) return;
    struck_ = true;
    if (plan_.act == Act::kKill) kill(getpid(), SIGKILL);
    if (plan_.act == Act::kStop) stop_self();
  }
  std::int64_t now_ns() override {
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
  }
  bool struck() const { return struck_; }

 private:
  Plan plan_;
  std::atomic<int> reached_{0};
  std::atomic<bool> struck_{false};
};

constexpr const char* kSurvived = "survived";

/// The call, and a barrier behind it: whoever had all it needed from the victim before the end
/// learns of it there.
std::optional<Thrown> call_once(Buffer& buffer, const std::function<void()>& call) {
  auto thrown = thrown_by(call);
  if (!thrown) thrown = thrown_by([&] { buffer.barrier(); });
  return thrown;
}

/// The victim's part. Answers only if it is still alive.
std::string play_victim(const Plan& plan, Buffer& buffer, const std::function<void()>& call) {
  if (plan.act == Act::kKillAfterMicroseconds) {
    std::thread([&plan] {
      usleep(static_cast<useconds_t>(plan.count));
      kill(getpid(), SIGKILL);
    }).detach();
    for (;;) call_once(buffer, call);
  }
  Executioner executioner(plan);
  const auto thrown = call_once(buffer, [&] {
    protocol::scheduler = &executioner;
    try {
      call();
    } catch (...) {
      protocol::scheduler = nullptr;
      throw;
    }
    protocol::scheduler = nullptr;
  });
  if (!executioner.struck()) return thrown ? "not struck, but: " + thrown->text : kSurvived;
  // Awake again, it must learn that the others have given it up.
  return thrown ? "" : "the victim woke up and noticed nothing";
}

/// Calls until the victim's end is noticed. Nothing if the victim survived.
std::optional<Thrown> call_until_error(const Plan& plan, Buffer& buffer,
                                       const std::function<void()>& call) {
  auto thrown = call_once(buffer, call);
  if (plan.act != Act::kKillAfterMicroseconds) return thrown;
  const auto begin = std::chrono::steady_clock::now();
  while (!thrown && std::chrono::steady_clock::now() - begin < 20s)
    thrown = call_once(buffer, call);
  return thrown;
}

/// Builds Buffers until rank 0 dies of it, so many microseconds after the beginning.
std::string play_construction(Worker& worker, int microseconds) {
  const Belongings before = Belongings::count();
  Findings findings;
  if (worker.rank() == 0) {
    std::thread([microseconds] {
      usleep(static_cast<useconds_t>(microseconds));
      kill(getpid(), SIGKILL);
    }).detach();
  }
  BufferOptions options;
  options.timeout = 10s;
  const auto build = [&] { Buffer(worker.bootstrap(), options).barrier(); };
  const auto begin = std::chrono::steady_clock::now();
  std::optional<Thrown> thrown;
  while (!thrown && std::chrono::steady_clock::now() - begin < 20s) thrown = thrown_by(build);
  if (!thrown) return "no Error";
  findings.expect(thrown->code == ErrorCode::kPeerFailed,
                  fmt::format("code {}: {}", deep_ep::to_string(thrown->code), thrown->text));
  findings.expect_contains(thrown->text, "rank 0");
  findings.expect(thrown->after < 5s, "the Error took too long");
  check_new_buffer(findings, worker, {1, 2, 3});
  check_belongings(findings, before);
  return findings.text();
}

std::string play(Worker& worker, const std::string& job) {
  if (job.starts_with("construct")) return play_construction(worker, std::stoi(job.substr(10)));
  const Plan plan = Plan::parse(job);
  setenv("DEEP_EP_COMBINE", plan.combine.c_str(), 1);
  setenv("DEEP_EP_INBOX_BYTES", std::to_string(plan.inbox_bytes).c_str(), 1);
  const Belongings before = Belongings::count();
  Findings findings;
  {
    Keepsakes kept;
    BufferOptions options;
    options.timeout = 20s;
    options.num_rdma_bytes = Exchange::rdma_bytes(worker.num_ranks());
    options.low_latency_mode = true;
    const std::unique_ptr<Buffer> made = make_buffer(worker, options, plan.ranks_per_node);
    Buffer& buffer = *made;
    kept.take(buffer);
    const Exchange exchange(worker.rank(), worker.num_ranks());
    DispatchResult dispatched = buffer.dispatch(exchange.dispatch_args(buffer));
    buffer.barrier();
    buffer.set_timeout(std::chrono::milliseconds(plan.timeout_ms));
    worker.bootstrap()->barrier();  // nobody is in that one any more when the victim acts
    const auto call = [&] { exchange.run(buffer, plan.op, dispatched); };

    if (worker.rank() == plan.victim) return play_victim(plan, buffer, call);
    const auto thrown = call_until_error(plan, buffer, call);
    if (!thrown) return kSurvived;

    const bool stopped = plan.act == Act::kStop;
    findings.expect(thrown->code == (stopped ? ErrorCode::kTimeout : ErrorCode::kPeerFailed),
                    fmt::format("code {}", deep_ep::to_string(thrown->code)));
    findings.expect(thrown->ranks == std::vector{plan.victim}, "ranks() is not the victim");
    const bool named = thrown->text.find(to_string(plan.op)) != std::string::npos ||
                       thrown->text.find("barrier") != std::string::npos;
    findings.expect(named, "the operation is not named in '" + thrown->text + "'");
    for (const std::string& part :
         {fmt::format("rank {}", worker.rank()), fmt::format("rank {}", plan.victim),
          std::string("expected"), std::string("seen")})
      findings.expect_contains(thrown->text, part);
    const int limit_ms = stopped ? plan.timeout_ms * 3 + 3000 : 5000;
    findings.expect(thrown->after.count() < limit_ms,
                    fmt::format("the Error took {} ms", thrown->after.count()));
    check_aftermath(findings, buffer, kept, *thrown);
    ++given_up();
    std::vector<int> others;
    for (int rank = 0; rank < worker.num_ranks(); ++rank) {
      if (rank != plan.victim) others.push_back(rank);
    }
    check_new_buffer(findings, worker, others);
    dispatched = {};
  }
  check_belongings(findings, before);
  return findings.text();
}

class Fault : public testing::Test {
 protected:
  void TearDown() override {
    for (const auto& entry : std::filesystem::directory_iterator("/dev/shm"))
      EXPECT_EQ(entry.path().string().find("deep_ep"), std::string::npos) << entry.path();
  }

  /// True if the victim was struck.
  bool run(const Plan& plan) { return run(plan.text(), plan.victim); }

  bool run(const std::string& job, int victim) {
    given_up() = 0;
    const auto outcomes = pool_.run(kRanks, job, kJobLimit);
    bool survived = false;
    for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
      const Outcome& outcome = outcomes[rank];
      if (outcome.answer == kSurvived) {
        survived = true;
        continue;
      }
      if (static_cast<int>(rank) == victim && outcome.signal == SIGKILL) continue;
      EXPECT_TRUE(outcome.answered && outcome.answer.empty())
          << "job '" << job << "', rank " << rank << ": "
          << (outcome.timed_out ? "hangs" : outcome.answer + outcome.failure);
    }
    return !survived;
  }

  /// Strikes at every `step`-th point of the kind, until the call ends before the point is reached.
  void run_at_points(Plan plan, int step, int most) {
    int struck = 0;
    for (plan.count = 1; plan.count <= most && !HasFailure(); plan.count += step) {
      plan.victim = plan.count / step % kRanks;
      if (!run(plan)) break;
      ++struck;
    }
    RecordProperty(fmt::format("points_{}", static_cast<int>(plan.point)), struck);
    // A wait may be over before it turns even once; publications are always there.
    if (plan.point == protocol::Point::kPublish) {
      EXPECT_GT(struck, 0);
    }
  }

 private:
  std::atomic<int>& mapped_before_forks_ = given_up();
  Pool pool_{kRanks, play};
};

TEST_F(Fault, ARankKilledWhileBuffersAreBuiltIsNamed) {
  const unsigned seed = std::random_device{}();
  RecordProperty("seed", static_cast<int>(seed));
  std::mt19937 random(seed);
  for (int i = 0; i < 12 && !HasFailure(); ++i)
    run(fmt::format("construct {}", random() % 8000), 0);
}

struct Kind {
  const char* name;
  Op op;
  const char* combine = "auto";
  std::int64_t inbox_bytes = kInboxBytes;
  int publications_step = 1;  ///< packets of one message look the same to the others
  int ranks_per_node = 0;
  int rows_step = 11;  ///< all points between two publications look the same to the others
};

class FaultInEveryCall : public Fault, public testing::WithParamInterface<Kind> {
 protected:
  static Plan plan() {
    const Kind& kind = GetParam();
    return {.combine = kind.combine,
            .inbox_bytes = kind.inbox_bytes,
            .op = kind.op,
            .ranks_per_node = kind.ranks_per_node};
  }
  static Plan plan_at(protocol::Point point) {
    Plan one = plan();
    one.point = point;
    return one;
  }
};

TEST_P(FaultInEveryCall, ARankKilledAtAnyPublicationIsNamed) {
  const int fine = GetParam().publications_step;
  const int step = wants_full() || fine == 1 ? fine : 2 * fine - 1;
  run_at_points(plan_at(protocol::Point::kPublish), step, 1000 * step);
}

TEST_P(FaultInEveryCall, ARankKilledAtAnyTurnOfAWaitIsNamed) {
  run_at_points(plan_at(protocol::Point::kWait), 1, 12);
}

TEST_P(FaultInEveryCall, ARankKilledBetweenAnyTwoRowsIsNamed) {
  run_at_points(plan_at(protocol::Point::kCopy), wants_full() ? 1 : GetParam().rows_step, 1000);
}

TEST_P(FaultInEveryCall, ARankKilledAtAnyTimeIsNamed) {
  const unsigned seed = std::random_device{}();
  RecordProperty("seed", static_cast<int>(seed));
  std::mt19937 random(seed);
  for (int i = 0; i < 8 && !HasFailure(); ++i) {
    Plan one = plan();
    one.act = Act::kKillAfterMicroseconds;
    one.count = 1 + static_cast<int>(random() % 3000);
    one.victim = i % kRanks;
    EXPECT_TRUE(run(one)) << "seed " << seed;
  }
}

TEST_P(FaultInEveryCall, AStoppedRankIsNamedAfterTheTimeout) {
  for (const int count : {1, 2, 4}) {
    // Between nodes a barrier has fewer: its signals are no publications of the rank's own.
    if (GetParam().ranks_per_node > 0 && count > GetParam().ranks_per_node) break;
    Plan one = plan_at(protocol::Point::kPublish);
    one.act = Act::kStop;
    one.count = count;
    one.victim = count % kRanks;
    one.timeout_ms = 1200;
    EXPECT_TRUE(run(one));
  }
}

std::string name_of(const testing::TestParamInfo<Kind>& call) { return call.param.name; }

// A small inbox: outputs are read from the ranks that have them, a piece of a row at a time.
INSTANTIATE_TEST_SUITE_P(
    Calls, FaultInEveryCall,
    testing::Values(Kind{"barrier", Op::kBarrier}, Kind{"dispatch", Op::kDispatch},
                    Kind{"cached_dispatch", Op::kCachedDispatch}, Kind{"combine", Op::kCombine},
                    Kind{"combine_pull", Op::kCombineOwn, "pull", 2048},
                    Kind{"combine_mapped", Op::kCombine, "pull", 2048},
                    Kind{"combine_ring", Op::kCombine, "ring"},
                    Kind{"low_latency", Op::kLowLatency, "auto", kInboxBytes, 67}),
    name_of);

#if defined(DEEP_EP_HAS_UCX)
constexpr Kind between_nodes(const char* name, Op op, int ranks_per_node) {
  return {name, op, "auto", kInboxBytes, op == Op::kLowLatency ? 67 : 3, ranks_per_node};
}

// What goes to another node is told by one word, behind all packets and rows.
constexpr Kind low_latency_between_nodes(const char* name, int ranks_per_node) {
  return {name, Op::kLowLatency, "auto", kInboxBytes, 201, ranks_per_node, 47};
}

// Ranks of this machine pose as nodes: of two, where the victim's neighbour tells the other node,
// and of one, where the network must.
INSTANTIATE_TEST_SUITE_P(
    CallsBetweenNodes, FaultInEveryCall,
    testing::Values(between_nodes("barrier", Op::kBarrier, 2),
                    between_nodes("dispatch", Op::kDispatch, 2),
                    between_nodes("cached_dispatch", Op::kCachedDispatch, 2),
                    between_nodes("combine", Op::kCombine, 2),
                    between_nodes("dispatch_of_single_ranks", Op::kDispatch, 1),
                    between_nodes("combine_of_single_ranks", Op::kCombine, 1),
                    low_latency_between_nodes("low_latency", 2),
                    low_latency_between_nodes("low_latency_of_single_ranks", 1)),
    name_of);
#endif

}  // namespace
}  // namespace deep_ep::test
