#include "deep_ep/config.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>

#include "deep_ep/error.hpp"

namespace deep_ep {
namespace {

/// What DeepEP asks its callers for, so that theirs is always enough: C * n * (2r + 3) * 4 + C * n
/// * recv * (hidden_bytes + 8 + 128 * 8 + 128 * 4 + 128 * 4), rounded up to 128 bytes; C = num_sms
/// / 2 channels, n = min(R, 8) peers, r = max(R / 8, 1) nodes.
std::int64_t deep_ep_v1_hint(const Config& config, std::int64_t hidden_bytes, int num_ranks) {
  const std::int64_t channels = config.num_sms / 2;
  const std::int64_t peers = num_ranks < 8 ? num_ranks : 8;
  const std::int64_t nodes = num_ranks / 8 > 1 ? num_ranks / 8 : 1;
  const std::int64_t bytes = channels * peers * (2 * nodes + 3) * 4 +
                             channels * peers * config.num_max_nvl_chunked_recv_tokens *
                                 (hidden_bytes + 8 + 128 * 8 + 128 * 4 + 128 * 4);
  return (bytes + 127) / 128 * 128;
}

TEST(Config, TheNvlHintIsAtMostDeepEps) {
  for (const int num_sms : {2, 8, 20, 24, 64, 132}) {
    for (const int recv : {1, 8, 256, 720}) {
      for (const std::int64_t hidden_bytes : {16, 256, 4096, 14336, 32768, 65536}) {
        for (int num_ranks = 1; num_ranks <= 16; ++num_ranks) {
          Config config;
          config.num_sms = num_sms;
          config.num_max_nvl_chunked_send_tokens = 1;
          config.num_max_nvl_chunked_recv_tokens = recv;
          EXPECT_LE(config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks),
                    deep_ep_v1_hint(config, hidden_bytes, num_ranks))
              << num_sms << " SMs, recv " << recv << ", " << hidden_bytes << " bytes, " << num_ranks
              << " ranks";
        }
      }
    }
  }
}

TEST(Config, TheNvlHintIsAMultipleOf128) {
  for (const std::int64_t hidden_bytes : {1, 16, 100, 14336}) {
    for (const int num_ranks : {1, 2, 3, 8}) {
      const std::int64_t hint = Config{}.get_nvl_buffer_size_hint(hidden_bytes, num_ranks);
      EXPECT_EQ(hint % 128, 0);
      EXPECT_GT(hint, 0);
    }
  }
}

TEST(Config, HintsAcceptAnything) {
  constexpr auto kHuge = std::numeric_limits<std::int64_t>::max();
  constexpr auto kMany = std::numeric_limits<int>::max();
  for (const std::int64_t hidden_bytes :
       {std::int64_t{-1}, std::int64_t{0}, std::int64_t{1}, kHuge}) {
    for (const int any : {-1, 0, 1, 7, kMany}) {
      Config config;
      config.num_sms = any;
      config.num_max_nvl_chunked_send_tokens = any;
      config.num_max_nvl_chunked_recv_tokens = any;
      EXPECT_GE(config.get_nvl_buffer_size_hint(hidden_bytes, any), 0);
      EXPECT_EQ(config.get_nvl_buffer_size_hint(hidden_bytes, any) % 128, 0);
      EXPECT_GE(config.get_rdma_buffer_size_hint(hidden_bytes, any), 0);
    }
  }
}

TEST(Config, ValuesBelowOneCountAsOne) {
  EXPECT_EQ(Config{}.get_nvl_buffer_size_hint(0, 4), Config{}.get_nvl_buffer_size_hint(1, 4));
  EXPECT_EQ(Config{}.get_nvl_buffer_size_hint(1024, -3),
            Config{}.get_nvl_buffer_size_hint(1024, 1));
}

TEST(Config, TheRdmaHintIsZeroOnOneNode) {
  for (const int num_ranks : {1, 2, 8})
    EXPECT_EQ(Config{}.get_rdma_buffer_size_hint(14336, num_ranks), 0);
}

TEST(Config, TheHintForSeveralNodesHoldsTheWindowToEachOfThem) {
  Config config;
  for (const int nodes : {2, 3, 8}) {
    std::int64_t before = 0;
    for (const int window : {64, 256, 1024}) {
      config.num_max_rdma_chunked_recv_tokens = window;
      const std::int64_t hint = config.get_rdma_buffer_size_hint(14336, 8 * nodes);
      EXPECT_EQ(hint % 128, 0);
      EXPECT_GT(hint, 2 * (nodes - 1) * window * std::int64_t{14336});
      EXPECT_GE(hint, before);
      before = hint;
    }
  }
  setenv("DEEP_EP_RANKS_PER_NODE", "2", 1);
  EXPECT_EQ(config.get_rdma_buffer_size_hint(14336, 2), 0);
  EXPECT_GT(config.get_rdma_buffer_size_hint(14336, 4), 0);
  setenv("DEEP_EP_RANKS_PER_NODE", "none", 1);
  EXPECT_EQ(config.get_rdma_buffer_size_hint(14336, 8), 0);
  unsetenv("DEEP_EP_RANKS_PER_NODE");
}

TEST(Config, DefaultsAreValid) { EXPECT_NO_THROW(Config{}.validate()); }

TEST(Config, EachFieldIsNamedWhenItIsOutOfRange) {
  const auto text_of = [](int Config::*field, int value) -> std::string {
    Config config;
    config.*field = value;
    try {
      config.validate();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    return "no Error";
  };
  using testing::AllOf;
  using testing::HasSubstr;
  for (const int bad : {0, -5}) {
    const std::string value = std::to_string(bad);
    EXPECT_THAT(text_of(&Config::num_sms, bad), AllOf(HasSubstr("num_sms"), HasSubstr(value)));
    EXPECT_THAT(text_of(&Config::num_max_nvl_chunked_send_tokens, bad),
                AllOf(HasSubstr("num_max_nvl_chunked_send_tokens"), HasSubstr(value)));
    EXPECT_THAT(text_of(&Config::num_max_nvl_chunked_recv_tokens, bad),
                AllOf(HasSubstr("num_max_nvl_chunked_recv_tokens"), HasSubstr(value)));
    EXPECT_THAT(text_of(&Config::num_max_rdma_chunked_send_tokens, bad),
                AllOf(HasSubstr("num_max_rdma_chunked_send_tokens"), HasSubstr(value)));
    EXPECT_THAT(text_of(&Config::num_max_rdma_chunked_recv_tokens, bad),
                AllOf(HasSubstr("num_max_rdma_chunked_recv_tokens"), HasSubstr(value)));
  }
  EXPECT_THAT(text_of(&Config::num_max_nvl_chunked_send_tokens, 257),
              AllOf(HasSubstr("257"), HasSubstr("256")));
  EXPECT_THAT(text_of(&Config::num_max_rdma_chunked_send_tokens, 257),
              AllOf(HasSubstr("257"), HasSubstr("256")));
}

TEST(Config, AnySmCountFromOneIsAllowed) {
  for (const int num_sms : {1, 3, 7, 1000}) {
    Config config;
    config.num_sms = num_sms;
    EXPECT_NO_THROW(config.validate());
  }
}

}  // namespace
}  // namespace deep_ep
