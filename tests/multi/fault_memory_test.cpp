#include <fmt/format.h>
#include <gtest/gtest.h>

#include "multi/failing_allocator.hpp"
#include "multi/fault_play.hpp"

// One rank's allocator fails at any allocation of a call: all ranks must end with an Error that
// says so.

namespace deep_ep::test {
namespace {

using std::chrono_literals::operator""s;

constexpr int kRanks = 3;
constexpr int kVictim = 1;
constexpr const char* kSurvived = "survived";

void check_thrown(Findings& findings, int rank, const Thrown& thrown) {
  findings.expect(thrown.code == ErrorCode::kOutOfMemory,
                  fmt::format("code {}: {}", deep_ep::to_string(thrown.code), thrown.text));
  findings.expect_contains(thrown.text, "the allocator has no memory");
  if (rank != kVictim) findings.expect_contains(thrown.text, fmt::format("rank {}", kVictim));
  findings.expect(thrown.after < 8s, "the Error took too long");
}

/// Arguments are made before: only the call itself runs short of memory.
std::function<void()> prepare(const Exchange& exchange, Buffer& buffer, Op op,
                              const DispatchResult& dispatched) {
  switch (op) {
    case Op::kDispatch:
      return [args = exchange.dispatch_args(buffer), &buffer] { buffer.dispatch(args); };
    case Op::kCombine:
      return [args = Exchange::combine_args(dispatched), &buffer] { buffer.combine(args); };
    default:
      return [&exchange, &buffer, op, &dispatched] { exchange.run(buffer, op, dispatched); };
  }
}

std::string play(Worker& worker, const std::string& job) {
  const std::size_t space = job.find(' ');
  const Op op = static_cast<Op>(std::stoi(job));
  const int fail_at = std::stoi(job.substr(space));
  const Belongings before = Belongings::count();
  Findings findings;
  {
    Keepsakes kept;
    BufferOptions options;
    options.timeout = 20s;
    Buffer buffer(worker.bootstrap(), options);
    kept.take(buffer);
    const Exchange exchange(worker.rank(), worker.num_ranks());
    DispatchResult dispatched = buffer.dispatch(exchange.dispatch_args(buffer));
    // What a first combine makes for good: the streams in that catch what is thrown in them.
    buffer.combine(Exchange::combine_args(dispatched));
    const std::function<void()> call = prepare(exchange, buffer, op, dispatched);
    worker.bootstrap()->barrier();  // nobody is in a call when the victim fails
    std::optional<Thrown> thrown;
    if (worker.rank() == kVictim) {
      fail_allocation(fail_at);
      thrown = thrown_by(call);
      const bool failed = allocation_failed();
      fail_allocation(0);
      if (!failed && thrown) return "no allocation failed, but: " + thrown->text;
      if (failed && !thrown) return "the failure was swallowed";
    } else {
      thrown = thrown_by(call);
    }
    // Whoever had all it needed before it was told learns of it in the next call.
    if (!thrown) thrown = thrown_by([&] { buffer.barrier(); });
    if (!thrown) return kSurvived;
    check_thrown(findings, worker.rank(), *thrown);
    check_aftermath(findings, buffer, kept, *thrown);
    check_new_buffer(findings, worker, {0, 1, 2});
    dispatched = {};
  }
  check_belongings(findings, before);
  return findings.text();
}

class FaultOfMemory : public testing::TestWithParam<Op> {
 protected:
  Pool pool_{kRanks, play};
};

TEST_P(FaultOfMemory, AnyAllocationThatFailsIsToldToAll) {
  int fail_at = 1;
  int told = 0;
  for (bool survived = false; !survived && fail_at < 200; ++fail_at) {
    const auto outcomes =
        pool_.run(kRanks, fmt::format("{} {}", static_cast<int>(GetParam()), fail_at), 60s);
    const std::string answer = outcomes[kVictim].answer + outcomes[kVictim].failure;
    survived = answer == kSurvived;
    ASSERT_TRUE(survived || answer.empty()) << answer;
    told += answer.empty() ? 1 : 0;
    for (const std::size_t rank : {0, 2}) {
      const Outcome& outcome = outcomes[rank];
      ASSERT_EQ(outcome.answer + outcome.failure, answer.empty() ? "" : kSurvived)
          << "rank " << rank << ", allocation " << fail_at << (outcome.timed_out ? ", hangs" : "");
    }
  }
  RecordProperty("told", told);
  EXPECT_GT(told, 1) << "hardly any allocation failed";
  EXPECT_LT(fail_at, 200);
}

std::string name_of(const testing::TestParamInfo<Op>& call) {
  return call.param == Op::kCachedDispatch ? "cached_dispatch" : to_string(call.param);
}

INSTANTIATE_TEST_SUITE_P(Calls, FaultOfMemory,
                         testing::Values(Op::kBarrier, Op::kDispatch, Op::kCachedDispatch,
                                         Op::kCombine),
                         name_of);

}  // namespace
}  // namespace deep_ep::test
