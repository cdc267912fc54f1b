#include <fmt/format.h>
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <tuple>

#include "multi/fault_situations.hpp"

// Ranks that disagree, or refuse what they were given, tell all others at once; misuse of one rank
// touches nobody.

namespace deep_ep::test {
namespace {

using std::chrono_literals::operator""s;

/// Far above what telling takes, so that a wait that runs out shows.
constexpr auto kTimeout = 20s;
constexpr auto kAtOnce = std::chrono::milliseconds(8000);

/// Ranks of a node in the present job; 0: all are of one.
int ranks_per_node = 0;

/// An Error of this code, and at once.
void check_told(Findings& findings, const Thrown& thrown, ErrorCode code) {
  findings.expect(thrown.code == code,
                  fmt::format("code {}: {}", deep_ep::to_string(thrown.code), thrown.text));
  findings.expect(thrown.after < kAtOnce, fmt::format("telling took {} ms", thrown.after.count()));
}

std::unique_ptr<Buffer> make_buffer(Worker& worker) {
  BufferOptions options;
  options.timeout = kTimeout;
  return make_buffer(worker, options, ranks_per_node);
}

/// The situations by number: disagreements, then refusals.
const Situation& situation(std::size_t i) {
  return i < disagreements().size() ? disagreements()[i] : refusals()[i - disagreements().size()];
}

void check_thrown(Findings& findings, int rank, bool refusal, const Situation& it,
                  const Thrown& thrown) {
  const ErrorCode code = !refusal          ? ErrorCode::kDisagreement
                         : rank == kVictim ? ErrorCode::kInvalidArgument
                                           : ErrorCode::kPeerFailed;
  check_told(findings, thrown, code);
  findings.expect_contains(thrown.text, it.field);
  if (rank == kVictim && refusal) return;
  findings.expect_contains(thrown.text, fmt::format("rank {}", kVictim));
  if (refusal) findings.expect(thrown.ranks == std::vector{kVictim}, "ranks() is not the refuser");
}

std::string play_situation(Worker& worker, std::size_t number) {
  const Situation& it = situation(number);
  Findings findings;
  Keepsakes kept;
  const std::unique_ptr<Buffer> made = make_buffer(worker);
  Buffer& buffer = *made;
  kept.take(buffer);
  const Exchange exchange(worker.rank(), worker.num_ranks());
  const DispatchResult dispatched = buffer.dispatch(exchange.dispatch_args(buffer));
  buffer.barrier();
  worker.bootstrap()->barrier();  // nobody is in that one any more when the victim acts
  const Scene scene{buffer, exchange, dispatched, worker.rank() == kVictim};
  auto thrown = thrown_by([&] { it.call(scene); });
  // Whoever had all it needed before it was told learns of it in the next call.
  if (!thrown && worker.rank() != kVictim) thrown = thrown_by([&] { buffer.barrier(); });
  if (!thrown) return "no Error";
  check_thrown(findings, worker.rank(), number >= disagreements().size(), it, *thrown);
  check_aftermath(findings, buffer, kept, *thrown);
  check_new_buffer(findings, worker, {0, 1, 2});
  return findings.text();
}

std::string play_too_few_worst_tokens(Worker& worker, bool on_all) {
  const std::unique_ptr<Buffer> made = make_buffer(worker);
  Buffer& buffer = *made;
  const Exchange exchange(worker.rank(), worker.num_ranks());
  Findings findings;
  DispatchArgs args = exchange.dispatch_args(buffer);
  args.num_worst_tokens = Exchange::kTokens * kRanks - (on_all || worker.rank() == kVictim ? 1 : 0);
  worker.bootstrap()->barrier();  // what is timed begins at once
  const auto thrown = thrown_by([&] {
    buffer.dispatch(args);
    buffer.barrier();
  });
  if (!thrown) return "no Error";
  check_told(findings, *thrown, ErrorCode::kCapacity);
  findings.expect_contains(thrown->text, "num_worst_tokens");
  findings.expect_contains(thrown->text, fmt::format("{}", Exchange::kTokens * kRanks - 1));
  return findings.text();
}

/// grouped_x has room for one row less than rank 1 has.
std::string play_too_few_grouped_rows(Worker& worker) {
  BufferOptions options;
  options.timeout = kTimeout;
  Buffer buffer(worker.bootstrap(), options);
  const Exchange exchange(worker.rank(), worker.num_ranks());
  Findings findings;
  DispatchArgs args = exchange.dispatch_args(buffer);
  args.num_worst_tokens = Exchange::kTokens * kRanks;
  args.group_rows = true;
  const std::int64_t room =
      buffer.dispatch(args).groups.group_offsets.as<std::int32_t>()[1];  // an expert a rank
  const Tensor memory = Tensor::empty(args.x.dtype, {room, Exchange::kHidden});
  args.grouped_x = memory;
  args.grouped_x.shape[0] -= worker.rank() == kVictim ? 1 : 0;
  worker.bootstrap()->barrier();
  const auto thrown = thrown_by([&] {
    buffer.dispatch(args);
    buffer.barrier();
  });
  if (!thrown) return "no Error";
  check_told(findings, *thrown, ErrorCode::kCapacity);
  findings.expect_contains(thrown->text, fmt::format("room for {}", room - 1));
  return findings.text();
}

/// Results of which no machine has the memory.
std::string play_shortage(Worker& worker) {
  Findings findings;
  Keepsakes kept;
  const std::unique_ptr<Buffer> made = make_buffer(worker);
  Buffer& buffer = *made;
  kept.take(buffer);
  const Exchange exchange(worker.rank(), worker.num_ranks());
  DispatchArgs args = exchange.dispatch_args(buffer);
  args.num_worst_tokens = worker.rank() == kVictim ? INT32_MAX : Exchange::kTokens * kRanks;
  worker.bootstrap()->barrier();  // nobody is in a layout when the victim fails
  const auto thrown = thrown_by([&] {
    buffer.dispatch(args);
    buffer.barrier();
  });
  if (!thrown) return "no Error";
  check_told(findings, *thrown, ErrorCode::kOutOfMemory);
  for (const char* part : {"a segment of", "MiB", "leaves"})
    findings.expect_contains(thrown->text, part);
  if (worker.rank() != kVictim)
    findings.expect_contains(thrown->text, fmt::format("rank {}", kVictim));
  check_aftermath(findings, buffer, kept, *thrown);
  check_new_buffer(findings, worker, {0, 1, 2});
  return findings.text();
}

class ThrowingAllocator final : public Allocator {
 public:
  std::shared_ptr<void> allocate(std::int64_t, bool, const CallOptions&) override {
    throw std::range_error("the pool of tensors is empty");
  }
};

/// What the victim's allocator throws is no Error, and is told all the same.
std::string play_foreign_exception(Worker& worker) {
  Findings findings;
  BufferOptions options;
  options.timeout = kTimeout;
  if (worker.rank() == kVictim) options.allocator = std::make_shared<ThrowingAllocator>();
  Buffer buffer(worker.bootstrap(), options);
  const Exchange exchange(worker.rank(), worker.num_ranks());
  DispatchArgs args = exchange.dispatch_args(buffer, false);
  worker.bootstrap()->barrier();
  std::optional<Thrown> thrown;
  try {
    thrown = thrown_by([&] { buffer.dispatch(args); });
  } catch (const std::range_error&) {
    findings.expect(worker.rank() == kVictim, "an exception of another rank");
  }
  if (worker.rank() == kVictim) {
    findings.expect(!thrown, "the caller does not get what its allocator threw");
    thrown = thrown_by([&] { buffer.check(); });
  }
  if (!thrown) return "no Error";
  check_told(findings, *thrown, ErrorCode::kSystem);
  findings.expect_contains(thrown->text, "the pool of tensors is empty");
  findings.expect_contains(thrown->text, fmt::format("rank {}", kVictim));
  return findings.text();
}

/// Memory that is mapped ahead is used; whoever cannot reserve tells all, and nothing is broken.
std::string play_reserve(Worker& worker) {
  constexpr std::int64_t kReserved = 24 << 20, kTooMuch = std::int64_t{1} << 50;
  Findings findings;
  const std::unique_ptr<Buffer> made = make_buffer(worker);
  Buffer& buffer = *made;
  const Exchange exchange(worker.rank(), worker.num_ranks());
  const std::int64_t before = buffer.mapped_bytes();
  buffer.reserve(kReserved);
  const std::int64_t mapped = buffer.mapped_bytes();
  findings.expect(mapped >= before + kReserved, "nothing was mapped ahead");
  DispatchArgs args = exchange.dispatch_args(buffer);
  args.num_worst_tokens = 20'000;  // of 1 KiB and some
  const DispatchResult held = buffer.dispatch(args);
  findings.expect(buffer.live_bytes() > kReserved * 3 / 4, "the results are smaller than meant");
  findings.expect(buffer.mapped_bytes() == mapped, "what was reserved was not used");

  const bool victim = worker.rank() == kVictim;
  for (const auto& [bytes, code, part] :
       {std::tuple{std::int64_t{-1}, ErrorCode::kInvalidArgument, "bytes is -1"},
        std::tuple{kTooMuch, ErrorCode::kOutOfMemory, "a segment of"}}) {
    const auto thrown = thrown_by([&] { buffer.reserve(victim ? bytes : 1); });
    if (!thrown) return "no Error";
    check_told(findings, *thrown, victim ? code : ErrorCode::kPeerFailed);
    findings.expect_contains(thrown->text, part);
    if (!victim) findings.expect(thrown->ranks == std::vector{kVictim}, "ranks() is not it");
  }
  const auto thrown = thrown_by([&] { buffer.dispatch(exchange.dispatch_args(buffer)); });
  findings.expect(!thrown, "the Buffer is broken");
  return findings.text();
}

/// Two threads of rank 0 call at once: one of them is refused, and the call goes on.
std::string play_overlap(Worker& worker) {
  BufferOptions options;
  options.timeout = kTimeout;
  Buffer buffer(worker.bootstrap(), options);
  Findings findings;
  if (worker.rank() == 0) {
    std::atomic<int> refused{0};
    std::atomic<int> done{0};
    const auto call = [&] {
      const auto thrown = thrown_by([&] { buffer.barrier(); });
      if (!thrown) ++done;
      if (thrown && thrown->code == ErrorCode::kUsage) ++refused;
    };
    std::thread first(call);
    std::thread second(call);
    while (refused == 0) std::this_thread::yield();
    worker.bootstrap()->barrier();
    first.join();
    second.join();
    findings.expect(refused == 1 && done == 1, fmt::format("{} refused, {} done", refused, done));
  } else {
    worker.bootstrap()->barrier();
    buffer.barrier();
  }
  const auto thrown = thrown_by([&] { buffer.barrier(); });
  findings.expect(!thrown, "the overlap broke the Buffer");
  return findings.text();
}

/// Rank 0 uses a Buffer behind its end, then all go on with another one.
std::string play_use_after_destroy(Worker& worker) {
  Findings findings;
  BufferOptions options;
  options.timeout = kTimeout;
  Buffer gone(worker.bootstrap(), options);
  Buffer other(worker.bootstrap(), options);
  const Exchange exchange(worker.rank(), worker.num_ranks());
  DispatchArgs args = exchange.dispatch_args(gone);
  const DispatchResult dispatched = gone.dispatch(args);
  gone.barrier();
  gone.destroy();
  gone.destroy();
  for (const auto& call : std::vector<std::function<void()>>{
           [&] { gone.barrier(); }, [&] { gone.dispatch(args); },
           [&] { gone.combine(Exchange::combine_args(dispatched)); },
           [&] { gone.get_dispatch_layout(args.topk_idx, kRanks); }, [&] { gone.reserve(1); }}) {
    const auto thrown = thrown_by(call);
    findings.expect(thrown && thrown->code == ErrorCode::kUsage,
                    "use after destroy is not refused as kUsage");
  }
  args.layout = other.get_dispatch_layout(args.topk_idx, kRanks);
  const auto thrown = thrown_by([&] { other.dispatch(args); });
  findings.expect(!thrown, "the other Buffer is broken");
  findings.expect(dispatched.recv_x.as<float>()[0] == 1.0F, "a result did not outlive its Buffer");
  return findings.text();
}

/// Rank 1 destroys its Buffer while the others go on: they learn who left.
std::string play_leaver(Worker& worker) {
  Findings findings;
  const std::unique_ptr<Buffer> made = make_buffer(worker);
  Buffer& buffer = *made;
  buffer.barrier();
  worker.bootstrap()->barrier();  // nobody is in that one any more
  if (worker.rank() == kVictim) {
    buffer.destroy();
    return "";
  }
  const auto thrown = thrown_by([&] { buffer.barrier(); });
  if (!thrown) return "no Error";
  check_told(findings, *thrown, ErrorCode::kPeerFailed);
  findings.expect(thrown->ranks == std::vector{kVictim}, "ranks() is not the leaver");
  findings.expect_contains(thrown->text, ranks_per_node == 0 ? "destroyed" : "reached");
  return findings.text();
}

constexpr std::string_view kSingleRanks = "nodes of one rank: ";

std::string play(Worker& worker, const std::string& whole_job) {
  const bool nodes = whole_job.starts_with(kSingleRanks);
  ranks_per_node = nodes ? 1 : 0;
  const std::string job = whole_job.substr(nodes ? kSingleRanks.size() : 0);
  if (job == "overlap") return play_overlap(worker);
  if (job == "after_destroy") return play_use_after_destroy(worker);
  if (job == "leaver") return play_leaver(worker);
  if (job == "worst_on_one") return play_too_few_worst_tokens(worker, false);
  if (job == "worst_on_all") return play_too_few_worst_tokens(worker, true);
  if (job == "shortage") return play_shortage(worker);
  if (job == "foreign_exception") return play_foreign_exception(worker);
  if (job == "reserve") return play_reserve(worker);
  if (job == "grouped") return play_too_few_grouped_rows(worker);
  return play_situation(worker, std::stoul(job));
}

class Refusal : public testing::Test {
 protected:
  void run(const std::string& job) { expect_all_well(pool_.run(kRanks, job, 60s)); }

 private:
  Pool pool_{kRanks, play};
};

class AllAreTold : public Refusal, public testing::WithParamInterface<std::size_t> {};

TEST_P(AllAreTold, WhichRankAndWhichField) { run(std::to_string(GetParam())); }

std::string name_of(const testing::TestParamInfo<std::size_t>& number) {
  const bool disagrees = number.param < disagreements().size();
  return std::string(disagrees ? "disagree_" : "refuse_") + situation(number.param).name;
}
const auto kSituations = testing::Range(std::size_t{0}, disagreements().size() + refusals().size());

INSTANTIATE_TEST_SUITE_P(Situations, AllAreTold, kSituations, name_of);

#if defined(DEEP_EP_HAS_UCX)
class AllAreToldBetweenNodes : public Refusal, public testing::WithParamInterface<std::size_t> {};

TEST_P(AllAreToldBetweenNodes, WhichRankAndWhichField) {
  run(std::string(kSingleRanks) + std::to_string(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Situations, AllAreToldBetweenNodes, kSituations, name_of);

TEST_F(Refusal, BetweenNodesTooFewWorstTokensFailAll) {
  run(std::string(kSingleRanks) + "worst_on_one");
  run(std::string(kSingleRanks) + "worst_on_all");
}
TEST_F(Refusal, BetweenNodesWhoLeavesIsNamed) { run(std::string(kSingleRanks) + "leaver"); }
#endif

TEST_F(Refusal, TooFewWorstTokensOnOneRankFailsAll) { run("worst_on_one"); }
TEST_F(Refusal, TooFewWorstTokensOnAllRanksFailsAll) { run("worst_on_all"); }
TEST_F(Refusal, TooFewGroupedRowsOnOneRankFailsAll) { run("grouped"); }
TEST_F(Refusal, AShortageOnOneRankIsToldWithItsSizes) { run("shortage"); }
TEST_F(Refusal, AnExceptionOfOneRanksAllocatorIsTold) { run("foreign_exception"); }
TEST_F(Refusal, ReservedMemoryIsUsedAndAFailureToReserveIsTold) { run("reserve"); }
TEST_F(Refusal, OverlappingCallsAreRefusedAndHarmless) { run("overlap"); }
TEST_F(Refusal, UseAfterDestroyTouchesNobody) { run("after_destroy"); }
TEST_F(Refusal, WhoLeavesIsNamed) { run("leaver"); }

}  // namespace
}  // namespace deep_ep::test
