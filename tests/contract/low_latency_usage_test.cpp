#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "deep_ep/deep_ep.hpp"

// What low-latency calls refuse, and how: ranks are threads of this process, of one node or of
// several.
namespace deep_ep {
namespace {

using testing::HasSubstr;
using std::chrono_literals::operator""s;

constexpr std::int64_t kTokens = 6;
constexpr std::int64_t kHidden = 128;
constexpr int kExpertsARank = 2;

std::unique_ptr<Buffer> make_buffer(const std::shared_ptr<Bootstrap>& bootstrap,
                                    bool enable_shrink = false) {
  BufferOptions options;
  options.num_threads = 1;
  options.timeout = 20s;
  options.enable_shrink = enable_shrink;
  options.low_latency_mode = true;
  options.num_rdma_bytes = Buffer::get_low_latency_rdma_size_hint(
      static_cast<int>(kTokens), 2 * kHidden, bootstrap->size(), kExpertsARank * bootstrap->size());
  return std::make_unique<Buffer>(bootstrap, options);
}

/// Every token goes to every rank.
struct Input {
  explicit Input(int num_ranks)
      : ranks(num_ranks), x(kTokens * kHidden, 0x3f80), weights(kTokens * num_ranks, 1.0f) {
    for (std::int64_t token = 0; token < kTokens; ++token)
      for (int rank = 0; rank < ranks; ++rank)
        ids.push_back(rank * kExpertsARank + token % kExpertsARank);
  }

  LowLatencyDispatchArgs dispatch() const {
    LowLatencyDispatchArgs args;
    args.x = {x.data(), DType::kBfloat16, {kTokens, kHidden}};
    args.topk_idx = {ids.data(), DType::kInt64, {kTokens, ranks}};
    args.num_max_dispatch_tokens_per_rank = static_cast<int>(kTokens);
    args.num_experts = kExpertsARank * ranks;
    args.use_fp8 = false;
    return args;
  }
  LowLatencyCombineArgs combine(const LowLatencyDispatchResult& dispatched) const {
    LowLatencyCombineArgs args;
    args.x = dispatched.recv_x;
    args.topk_idx = {ids.data(), DType::kInt64, {kTokens, ranks}};
    args.topk_weights = {weights.data(), DType::kFloat32, {kTokens, ranks}};
    args.handle = dispatched.handle;
    return args;
  }

  int ranks;
  std::vector<std::uint16_t> x;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
};

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return std::string(to_string(error.code())) + ": " + error.what();
  }
  return "no Error";
}

/// Each rank's text; `body` returns it.
std::vector<std::string> texts_of(int num_ranks,
                                  const std::function<std::string(Buffer&, const Input&)>& body) {
  const auto bootstraps = bootstrap_threads(num_ranks);
  std::vector<std::string> texts(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const auto buffer = make_buffer(bootstraps[rank]);
      const Input input(num_ranks);
      texts[rank] = body(*buffer, input);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return texts;
}

bool all_ones(const Tensor& rows, std::int64_t count, std::uint16_t value) {
  for (std::int64_t i = 0; i < count; ++i)
    if (rows.as<std::uint16_t>()[i] != value) return false;
  return true;
}

/// Of so many ranks a node; 0: all are of one.
class LowLatencyUsage : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (GetParam() > 0) setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(GetParam()).c_str(), 1);
  }
  void TearDown() override { unsetenv("DEEP_EP_RANKS_PER_NODE"); }
};
INSTANTIATE_TEST_SUITE_P(Nodes, LowLatencyUsage, testing::Values(0, 1),
                         [](const auto& ranks) -> std::string {
                           return ranks.param == 0 ? "one" : "of_single_ranks";
                         });

TEST_P(LowLatencyUsage, AThirdLiveResultIsRefusedAndTheBufferGoesOn) {
  const auto texts = texts_of(2, [](Buffer& buffer, const Input& input) {
    LowLatencyDispatchArgs args = input.dispatch();
    args.return_recv_hook = true;
    auto first = buffer.low_latency_dispatch(args);
    auto second = buffer.low_latency_dispatch(args);
    const std::string text = error_of([&] { buffer.low_latency_dispatch(args); });
    // Of the other kind there are two as well.
    second.recv_hook();
    auto combined = buffer.low_latency_combine(input.combine(second));
    first.recv_hook();
    auto third = buffer.low_latency_dispatch(args);
    third.recv_hook();
    EXPECT_TRUE(all_ones(combined.combined_x, kTokens * kHidden, 0x4000));  // 1 of each rank
    EXPECT_TRUE(all_ones(third.recv_x, kHidden, 0x3f80));
    return text;
  });
  for (const std::string& text : texts) {
    EXPECT_THAT(text, HasSubstr("usage"));
    EXPECT_THAT(text, HasSubstr("call 1 of this kind has not been received"));
  }
}

TEST_P(LowLatencyUsage, AHookRunsOnceAndNotBehindDestroy) {
  const auto texts = texts_of(2, [](Buffer& buffer, const Input& input) {
    LowLatencyDispatchArgs args = input.dispatch();
    args.return_recv_hook = true;
    const auto first = buffer.low_latency_dispatch(args);
    first.recv_hook();
    const std::string twice = error_of([&] { first.recv_hook(); });
    const auto second = buffer.low_latency_dispatch(args);
    buffer.barrier();
    buffer.destroy();
    return twice + " / " + error_of([&] { second.recv_hook(); });
  });
  for (const std::string& text : texts) {
    EXPECT_THAT(text, HasSubstr("recv_hook has run already / "));
    EXPECT_THAT(text, HasSubstr("the Buffer is destroyed"));
  }
}

struct Difference {
  const char* field;
  void (*change)(LowLatencyDispatchArgs& args);
};

TEST_P(LowLatencyUsage, RanksThatDisagreeAreToldTheField) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ranks that disagree write over each other's messages, which nobody reads then";
#endif
  static std::vector<std::int32_t> narrow_ids(kTokens * 2, 0);
  static std::vector<float> weights(kTokens * 2, 1.0f);
  static std::vector<std::uint16_t> x(kTokens * kHidden, 0x3f80);
  const Difference differences[] = {
      {"dtype of x", [](LowLatencyDispatchArgs& args) { args.use_fp8 = true; }},
      {"hidden",
       [](LowLatencyDispatchArgs& args) {
         args.x = {x.data(), DType::kBfloat16, {kTokens, kHidden / 2}};
       }},
      {"topk (columns",
       [](LowLatencyDispatchArgs& args) {
         args.topk_idx = {args.topk_idx.data, DType::kInt64, {kTokens, 1}};
       }},
      {"dtype of topk_idx",
       [](LowLatencyDispatchArgs& args) {
         args.topk_idx = {narrow_ids.data(), DType::kInt32, {kTokens, 2}};
       }},
      {"num_experts", [](LowLatencyDispatchArgs& args) { args.num_experts = 8; }},
      {"num_max_dispatch_tokens_per_rank",
       [](LowLatencyDispatchArgs& args) { args.num_max_dispatch_tokens_per_rank = 7; }},
      {"format", [](LowLatencyDispatchArgs& args) { args.format = LowLatencyFormat::kRankMajor; }},
      {"topk_weights",
       [](LowLatencyDispatchArgs& args) {
         args.topk_weights = {weights.data(), DType::kFloat32, {kTokens, 2}};
       }},
  };
  for (const Difference& difference : differences) {
    const auto texts = texts_of(2, [&](Buffer& buffer, const Input& input) {
      LowLatencyDispatchArgs args = input.dispatch();
      if (buffer.rank() == 1) difference.change(args);
      return error_of([&] { buffer.low_latency_dispatch(args); });
    });
    for (const std::string& text : texts) {
      EXPECT_THAT(text, HasSubstr("disagreement"));
      EXPECT_THAT(text, HasSubstr(difference.field));
    }
  }
}

TEST_P(LowLatencyUsage, AnExpertOutOfRangeIsNamedAndFailsAllRanks) {
  const auto texts = texts_of(3, [](Buffer& buffer, const Input& input) {
    Input own = input;
    if (buffer.rank() == 2) own.ids[kTokens * 3 - 2] = 6;
    return error_of([&] { buffer.low_latency_dispatch(own.dispatch()); });
  });
  for (const std::string& text : texts)
    EXPECT_THAT(text, HasSubstr("topk_idx[5, 1] is 6, allowed are -1 and 0 to 5"));
  EXPECT_THAT(texts[2], HasSubstr("invalid argument"));
  EXPECT_THAT(texts[0], HasSubstr("rank 2 reported"));
}

TEST_P(LowLatencyUsage, ACombineWithOtherExpertsThanItsDispatchFails) {
  for (const LowLatencyFormat format :
       {LowLatencyFormat::kExpertMajor, LowLatencyFormat::kRankMajor}) {
    const auto texts = texts_of(2, [&](Buffer& buffer, const Input& input) {
      LowLatencyDispatchArgs args = input.dispatch();
      args.format = format;
      const auto dispatched = buffer.low_latency_dispatch(args);
      Input other = input;
      // Token 0 stays away from rank 1, and the others' places there move.
      if (buffer.rank() == 0) other.ids[1] = -1;
      return error_of([&] { buffer.low_latency_combine(other.combine(dispatched)); });
    });
    for (const std::string& text : texts)
      EXPECT_THAT(text, HasSubstr("topk_idx of rank 0 is not what dispatch was given"));
  }
}

TEST_P(LowLatencyUsage, TooLittleMemoryIsRefusedWithWhatIsNeeded) {
  const auto texts = texts_of(1, [](Buffer& buffer, const Input&) {
    EXPECT_EQ(error_of([&] {
                buffer.clean_low_latency_buffer(static_cast<int>(kTokens), kHidden, kExpertsARank);
              }),
              "no Error");
    return error_of([&] { buffer.clean_low_latency_buffer(4096, 7168, kExpertsARank); });
  });
  EXPECT_THAT(texts[0], HasSubstr("capacity"));
  EXPECT_THAT(texts[0], HasSubstr("num_rdma_bytes is"));
}

TEST_P(LowLatencyUsage, ArgumentsAreCheckedBeforeAnythingIsSent) {
  const auto refused = [](void (*change)(LowLatencyDispatchArgs&)) {
    return texts_of(1, [&](Buffer& buffer, const Input& input) {
      LowLatencyDispatchArgs args = input.dispatch();
      change(args);
      return error_of([&] { buffer.low_latency_dispatch(args); });
    })[0];
  };
  EXPECT_THAT(
      refused([](LowLatencyDispatchArgs& args) { args.num_max_dispatch_tokens_per_rank = 5; }),
      HasSubstr("num_max_dispatch_tokens_per_rank is 5"));
  EXPECT_THAT(refused([](LowLatencyDispatchArgs& args) { args.use_fp8 = args.use_ue8m0 = true; }),
              HasSubstr("needs round_scale"));
  EXPECT_THAT(refused([](LowLatencyDispatchArgs& args) {
                args.use_fp8 = true;
                args.x.dtype = DType::kFloat16;
              }),
              HasSubstr("use_fp8 quantises bfloat16 alone"));
  EXPECT_THAT(refused([](LowLatencyDispatchArgs& args) {
                args.return_recv_hook = args.options.async_finish = true;
              }),
              HasSubstr("excludes async_finish"));
}

TEST_P(LowLatencyUsage, RowsComeHomeInOneFormatThatFitsThem) {
  const auto refused = [](std::int64_t hidden, bool use_logfmt, bool use_fp8) {
    return texts_of(1, [&](Buffer& buffer, const Input& input) {
      LowLatencyDispatchArgs args = input.dispatch();
      args.x = {input.x.data(), DType::kBfloat16, {kTokens, hidden}};
      const LowLatencyDispatchResult dispatched = buffer.low_latency_dispatch(args);
      LowLatencyCombineArgs combine = input.combine(dispatched);
      combine.use_logfmt = use_logfmt;
      combine.use_fp8 = use_fp8;
      return error_of([&] { buffer.low_latency_combine(combine); });
    })[0];
  };
  EXPECT_THAT(refused(kHidden, true, true), HasSubstr("use_logfmt and use_fp8 are true"));
  EXPECT_THAT(refused(kHidden / 2, true, false),
              HasSubstr("handle.hidden is 64: with use_logfmt it must be a multiple of 128"));
  EXPECT_THAT(refused(kHidden / 2, false, true), HasSubstr("with use_fp8 it must be"));
  EXPECT_EQ(refused(kHidden, true, false), "no Error");
  EXPECT_EQ(refused(kHidden / 2, false, false), "no Error");
}

TEST_P(LowLatencyUsage, RanksWhoseRowsComeHomeInOtherFormatsAreToldSo) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ranks that disagree write over each other's messages, which nobody reads then";
#endif
  const auto texts = texts_of(2, [](Buffer& buffer, const Input& input) {
    const LowLatencyDispatchResult dispatched = buffer.low_latency_dispatch(input.dispatch());
    LowLatencyCombineArgs args = input.combine(dispatched);
    args.use_logfmt = buffer.rank() == 1;
    return error_of([&] { buffer.low_latency_combine(args); });
  });
  for (const std::string& text : texts) {
    EXPECT_THAT(text, HasSubstr("disagreement"));
    EXPECT_THAT(text, HasSubstr("the format of rows on their way home"));
  }
}

TEST_P(LowLatencyUsage, MasksNeedEnableShrink) {
  const std::vector<std::string> texts = texts_of(2, [](Buffer& buffer, const Input&) {
    return error_of([&] { buffer.low_latency_update_mask_buffer(1 - buffer.rank(), true); });
  });
  EXPECT_THAT(texts[0], HasSubstr("enable_shrink"));
}

// In step again, a rank that was left out can be let in.
TEST_P(LowLatencyUsage, AMaskedRankIsLeftOutUntilItsMaskIsCleared) {
  const auto bootstraps = bootstrap_threads(3);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 3; ++rank) {
    threads.emplace_back([&, rank] {
      const auto buffer = make_buffer(bootstraps[rank], true);
      const Input input(3);
      const auto combined_is = [&](std::uint16_t value) {
        const auto dispatched = buffer->low_latency_dispatch(input.dispatch());
        const auto combined = buffer->low_latency_combine(input.combine(dispatched));
        EXPECT_TRUE(all_ones(combined.combined_x, kTokens * kHidden, value)) << "rank " << rank;
      };
      combined_is(0x4040);  // 3
      // Rank 2 leaves the others out, and they it.
      for (int other = 0; other < 3; ++other)
        if (other != rank && (rank == 2 || other == 2))
          buffer->low_latency_update_mask_buffer(other, true);
      std::vector<std::int32_t> masks(3, 7);
      buffer->low_latency_query_mask_buffer({masks.data(), DType::kInt32, {3}});
      EXPECT_EQ(masks, rank == 2 ? (std::vector<std::int32_t>{1, 1, 0})
                                 : (std::vector<std::int32_t>{0, 0, 1}));
      combined_is(rank == 2 ? 0x3f80 : 0x4000);
      buffer->barrier();
      buffer->low_latency_clean_mask_buffer();
      buffer->barrier();
      combined_is(0x4040);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(LowLatencyUsage, FirstTicketsMustBeAlike) {
  setenv("DEEP_EP_FIRST_TICKET", "0", 1);
  EXPECT_THAT(error_of([] { make_buffer(bootstrap_threads(1)[0]); }),
              HasSubstr("DEEP_EP_FIRST_TICKET: '0' is not allowed"));
  unsetenv("DEEP_EP_FIRST_TICKET");
}

}  // namespace
}  // namespace deep_ep
