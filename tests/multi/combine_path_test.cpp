#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "deep_ep/deep_ep.hpp"
#include "multi/in_ranks.hpp"
#include "refusal.hpp"

// Which way combine takes between processes, and what happens where a rank's memory cannot be read.

namespace deep_ep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr std::int64_t kTokens = 3;
constexpr std::int64_t kHidden = 8;
constexpr const char* kPulls = "combine pulls";
constexpr const char* kInbox = "combine through the inbox";

void in_buffers(int size, const std::function<void(Buffer&)>& body) {
  in_ranks(size, [&](Bootstrap& bootstrap) {
    Buffer buffer(std::shared_ptr<Bootstrap>(&bootstrap, [](Bootstrap*) {}),
                  {.timeout = std::chrono::seconds(20)});
    body(buffer);
  });
}

/// Every token of every rank goes to the only expert of the last rank.
DispatchResult dispatch_to_last(Buffer& buffer, const std::vector<float>& x) {
  const std::vector<std::int64_t> ids(kTokens, buffer.num_ranks() - 1);
  const TensorView topk_idx(ids.data(), DType::kInt64, {kTokens, 1});
  return buffer.dispatch({.x = {x.data(), DType::kFloat32, {kTokens, kHidden}},
                          .layout = buffer.get_dispatch_layout(topk_idx, buffer.num_ranks()),
                          .topk_idx = topk_idx});
}

void expect_round_trip(Buffer& buffer) {
  const std::vector<float> x(kTokens * kHidden, 1.0F + static_cast<float>(buffer.rank()));
  for (int round = 0; round < 3; ++round) {
    const DispatchResult got = dispatch_to_last(buffer, x);
    const CombineResult out = buffer.combine({.x = got.recv_x, .handle = got.handle});
    for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(out.combined_x.as<float>()[i], x[i]);
  }
}

/// Without the rights of ptrace over each other. As root that takes another user.
void shut_memory() {
  if (geteuid() == 0) {
    EXPECT_EQ(setuid(65534), 0);
  }
  EXPECT_EQ(prctl(PR_SET_DUMPABLE, 0), 0);
}

TEST(CombinePath, RingIsTakenWhenAskedFor) {
  setenv("DEEP_EP_COMBINE", "ring", 1);
  in_buffers(3, [](Buffer& buffer) {
    EXPECT_THAT(buffer.transport(), HasSubstr(kInbox));
    expect_round_trip(buffer);
  });
  unsetenv("DEEP_EP_COMBINE");
}

TEST(CombinePath, RanksThatCannotReadEachOtherUseTheInbox) {
  in_ranks(3, [](Bootstrap& bootstrap) {
    shut_memory();
    Buffer buffer(std::shared_ptr<Bootstrap>(&bootstrap, [](Bootstrap*) {}),
                  {.timeout = std::chrono::seconds(20)});
    EXPECT_THAT(buffer.transport(), HasSubstr(kInbox));
    expect_round_trip(buffer);
  });
}

TEST(CombinePath, OutputsInTheResultsOfADispatchAreReadWhereTheyAre) {
  setenv("DEEP_EP_INBOX_BYTES", "128", 1);  // too small to hold the rows
  in_buffers(3, [](Buffer& buffer) { expect_round_trip(buffer); });
  unsetenv("DEEP_EP_INBOX_BYTES");
}

TEST(CombinePath, PullWhereItIsImpossibleIsRefusedOnAllRanks) {
  setenv("DEEP_EP_COMBINE", "pull", 1);
  in_ranks(2, [](Bootstrap& bootstrap) {
    shut_memory();
    EXPECT_THAT(refusal(
                    [&] {
                      Buffer(std::shared_ptr<Bootstrap>(&bootstrap, [](Bootstrap*) {}),
                             {.timeout = std::chrono::seconds(20)});
                    },
                    ErrorCode::kUnsupported),
                testing::AllOf(HasSubstr("DEEP_EP_COMBINE is pull"),
                               HasSubstr("rank 0 cannot read rank 1")));
  });
  unsetenv("DEEP_EP_COMBINE");
}

TEST(CombinePath, RanksWithDifferentSettingsAreTold) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    setenv("DEEP_EP_COMBINE", bootstrap.rank() == 0 ? "auto" : "ring", 1);
    EXPECT_THAT(refusal(
                    [&] {
                      Buffer(std::shared_ptr<Bootstrap>(&bootstrap, [](Bootstrap*) {}),
                             {.timeout = std::chrono::seconds(20)});
                    },
                    ErrorCode::kDisagreement),
                HasSubstr("DEEP_EP_COMBINE is"));
  });
}

TEST(CombinePath, RowsThatCannotBeReadAreAnErrorThatNamesTheirRank) {
  setenv("DEEP_EP_INBOX_BYTES", "128", 1);  // too small to hold the rows
  in_buffers(2, [](Buffer& buffer) {
    if (buffer.transport().find(kPulls) == std::string::npos) return;
    const std::vector<float> x(kTokens * kHidden, 1.0F);
    // None of rank 1's own tokens, so that it does not touch its rows itself.
    std::vector<std::int64_t> ids(kTokens, buffer.rank() == 0 ? 1 : -1);
    const TensorView topk_idx(ids.data(), DType::kInt64, {kTokens, 1});
    const DispatchResult got =
        buffer.dispatch({.x = {x.data(), DType::kFloat32, {kTokens, kHidden}},
                         .layout = buffer.get_dispatch_layout(topk_idx, 2),
                         .topk_idx = topk_idx});
    void* shut = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CombineArgs args;
    args.x = {shut, DType::kFloat32, {got.num_recv_tokens, kHidden}};
    args.handle = got.handle;
    try {
      buffer.combine(args);
      ADD_FAILURE() << "rank " << buffer.rank() << ": no Error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kPeerFailed);
      EXPECT_THAT(error.ranks(), ElementsAre(1));
      EXPECT_THAT(error.what(), HasSubstr("the rows of rank 1 cannot be read: Bad address"));
    }
  });
  unsetenv("DEEP_EP_INBOX_BYTES");
}

}  // namespace
}  // namespace deep_ep
