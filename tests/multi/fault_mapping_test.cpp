#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <filesystem>

#include "multi/fault_play.hpp"

// A rank that cannot map what another one has added says so to all, at once.

namespace deep_ep::test {
namespace {

using std::chrono_literals::operator""s;

constexpr int kRanks = 3;
constexpr int kVictim = 1;

/// How many files this process may open from here on: none.
void limit_files() {
  int highest = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    highest = std::max(highest, std::stoi(entry.path().filename()));
  const rlimit limit{static_cast<rlim_t>(highest) + 1, static_cast<rlim_t>(highest) + 1};
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0) throw std::runtime_error("setrlimit");
  while (dup(0) >= 0) {
  }
}

void check_thrown(Findings& findings, int rank, const std::optional<Thrown>& thrown,
                  const char* operation) {
  if (!thrown) return findings.expect(false, "no Error");
  const std::string& text = thrown->text;
  for (const char* part : {operation, "segment 1 of rank 0 cannot be mapped", "open files"})
    findings.expect_contains(text, part);
  findings.expect_contains(text, fmt::format("rank {}", kVictim));
  findings.expect(thrown->after < 8s, fmt::format("it took {} ms", thrown->after.count()));
  if (rank != kVictim) findings.expect(thrown->ranks == std::vector{kVictim}, "ranks() is not it");
}

std::string play(Worker& worker, const std::string& job) {
  Findings findings;
  BufferOptions options;
  options.timeout = 30s;
  options.num_nvl_bytes = 8 << 20;  // so that only rank 0 grows
  Buffer buffer(worker.bootstrap(), options);
  const Exchange exchange(worker.rank(), worker.num_ranks());
  DispatchArgs args = exchange.dispatch_args(buffer);
  args.num_worst_tokens = worker.rank() == 0 ? 20'000 : Exchange::kTokens * kRanks;
  buffer.barrier();
  if (worker.rank() == kVictim) limit_files();
  worker.bootstrap()->barrier();
  if (job == "dispatch") {
    auto thrown = thrown_by([&] { buffer.dispatch(args); });
    if (!thrown) thrown = thrown_by([&] { buffer.barrier(); });
    check_thrown(findings, worker.rank(), thrown, "dispatch");
  } else {
    const auto thrown = thrown_by([&] { buffer.reserve(worker.rank() == 0 ? 64 << 20 : 1); });
    check_thrown(findings, worker.rank(), thrown, "reserve");
  }
  return findings.text();
}

void run(const std::string& job) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "UBSan looks at objects through a pipe, for which no descriptor is left here";
#endif
  Pool pool(kRanks, play);
  expect_all_well(pool.run(kRanks, job, 60s));
}

TEST(FaultOfMapping, ASegmentThatCannotBeMappedIsNamedInADispatch) { run("dispatch"); }
TEST(FaultOfMapping, ASegmentThatCannotBeMappedIsNamedInAReserve) { run("reserve"); }

}  // namespace
}  // namespace deep_ep::test
