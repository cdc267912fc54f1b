#include "fabric/fabric.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <sstream>
#include <thread>

#include "deep_ep/error.hpp"
#include "fabric/segment_table.hpp"
#include "refusal.hpp"

namespace deep_ep::fabric {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

/// Replaces one word of what a Fabric exported, counted from 0.
std::string with_word(const std::string& exported, int index, const std::string& word) {
  std::istringstream in(exported);
  std::string out;
  int i = 0;
  for (std::string part; in >> part; ++i) out += (i == 0 ? "" : " ") + (i == index ? word : part);
  return out;
}
constexpr int kRankWord = 1;
constexpr int kUserWord = 3;
constexpr int kHostWord = 4;
constexpr int kSocketWord = 6;

TEST(Fabric, OneRankNeedsNoPeers) {
  Fabric fabric(0, 1, make_memfd_memory());
  EXPECT_EQ(fabric.add_segment(1), 0);
  fabric.open_handles({fabric.export_handles()}, milliseconds(100), {});
  EXPECT_EQ(fabric.add_segment(1), 1);
  EXPECT_NE(fabric.base(0, 1), nullptr);
  EXPECT_EQ(fabric.base(0, 2), nullptr);
  EXPECT_EQ(fabric.base(0, -1), nullptr);
  EXPECT_EQ(fabric.base(1, 0), nullptr);
  EXPECT_EQ(fabric.base(0, SegmentTable::kMaxSegments), nullptr);
}

TEST(Fabric, OwnSegmentOutlivesIt) {
  std::shared_ptr<Mapping> kept;
  {
    Fabric fabric(0, 1, make_memfd_memory());
    fabric.add_segment(4096);
    kept = fabric.own_segment(0);
    kept->base()[5] = std::byte{42};
    fabric.close();
    EXPECT_EQ(fabric.base(0, 0), nullptr);
  }
  EXPECT_EQ(kept->base()[5], std::byte{42});
}

TEST(Fabric, ThreadsOfOneProcessSeeOneAddress) {
  constexpr int kRanks = 4;
  std::vector<std::unique_ptr<Fabric>> fabrics;
  std::vector<std::string> exported;
  for (int i = 0; i < kRanks; ++i) {
    fabrics.push_back(std::make_unique<Fabric>(i, kRanks, make_memfd_memory()));
    fabrics[i]->add_segment(4096);
    exported.push_back(fabrics[i]->export_handles());
  }
  std::vector<std::thread> threads;
  for (auto& fabric : fabrics)
    threads.emplace_back([&] { fabric->open_handles(exported, milliseconds(20000), {}); });
  for (auto& thread : threads) thread.join();
  for (int i = 0; i < kRanks; ++i) {
    for (const auto& fabric : fabrics) EXPECT_EQ(fabric->base(i, 0), fabrics[i]->base(i, 0));
  }
}

TEST(Fabric, RanksOnTwoHostsAreToldWhoIsWhere) {
  Fabric fabric(0, 3, make_memfd_memory());
  const std::string own = fabric.export_handles();
  const std::string here = with_word(own, kRankWord, "2");
  const std::string there = with_word(with_word(own, kRankWord, "1"), kHostWord, "other/1");
  const std::string text = refusal(
      [&] {
        fabric.open_handles({own, there, here}, milliseconds(100), {});
      },
      ErrorCode::kUnsupported);
  EXPECT_THAT(text, HasSubstr("internode"));
  EXPECT_THAT(text, HasSubstr("ranks 0, 2 on"));
  EXPECT_THAT(text, HasSubstr("rank 1 on"));
}

TEST(Fabric, RanksOfTwoUsersAreRefused) {
  Fabric fabric(0, 2, make_memfd_memory());
  const std::string own = fabric.export_handles();
  const std::string other = with_word(with_word(own, kRankWord, "1"), kUserWord, "4242");
  EXPECT_THAT(refusal(
                  [&] {
                    fabric.open_handles({own, other}, milliseconds(100), {});
                  },
                  ErrorCode::kUnsupported),
              HasSubstr("rank 1 runs as user 4242"));
}

TEST(Fabric, PeerWhoseSocketIsGoneIsNamed) {
  Fabric fabric(1, 2, make_memfd_memory());
  const std::string own = fabric.export_handles();
  const std::string gone = with_word(with_word(own, kRankWord, "0"), kSocketWord, "deep_ep.nobody");
  EXPECT_THAT(refusal(
                  [&] {
                    fabric.open_handles({gone, own}, milliseconds(100), {});
                  },
                  ErrorCode::kPeerFailed),
              HasSubstr("rank 0"));
}

TEST(Fabric, ExportOfAnotherRankOrVersionIsRefused) {
  Fabric fabric(0, 2, make_memfd_memory());
  const std::string own = fabric.export_handles();
  for (const std::string& bad : {std::string(), std::string("nonsense"), own}) {
    EXPECT_THAT(refusal(
                    [&] {
                      fabric.open_handles({own, bad}, milliseconds(100), {});
                    },
                    ErrorCode::kDisagreement),
                HasSubstr("what rank 1 exported"));
  }
}

TEST(Fabric, StrangerWithoutTheCookieIsTurnedAway) {
  Fabric low(0, 2, make_memfd_memory());
  Fabric high(1, 2, make_memfd_memory());
  low.add_segment(4096);
  high.add_segment(4096);
  const std::vector<std::string> exported = {low.export_handles(), high.export_handles()};
  std::istringstream words(exported[0]);
  std::string name;
  for (int i = 0; i <= kSocketWord; ++i) words >> name;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  const int stranger = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  ASSERT_EQ(connect(stranger, reinterpret_cast<sockaddr*>(&address),
                    offsetof(sockaddr_un, sun_path) + 1 + name.size()),
            0);
  const std::string hello(40, '\1');
  ASSERT_GT(send(stranger, hello.data(), hello.size(), MSG_NOSIGNAL), 0);
  std::thread other([&] { high.open_handles(exported, milliseconds(20000), {}); });
  low.open_handles(exported, milliseconds(20000), {});
  other.join();
  EXPECT_NE(low.base(1, 0), nullptr);
  char byte = 0;
  EXPECT_LE(recv(stranger, &byte, 1, 0), 0);
  close(stranger);
}

TEST(Fabric, CallsOutOfOrderAreRefused) {
  Fabric fabric(0, 1, make_memfd_memory());
  const std::string other = [] {
    Fabric unused(0, 1, make_memfd_memory());
    return unused.export_handles();
  }();
  refusal([&] { fabric.open_handles({other}, milliseconds(100), {}); }, ErrorCode::kUsage);
  const std::string own = fabric.export_handles();
  fabric.open_handles({own}, milliseconds(100), {});
  refusal([&] { fabric.open_handles({own}, milliseconds(100), {}); }, ErrorCode::kUsage);
  fabric.close();
  refusal([&] { fabric.add_segment(4096); }, ErrorCode::kUsage);
}

}  // namespace
}  // namespace deep_ep::fabric
