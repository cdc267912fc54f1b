#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <thread>

#include "base/env.hpp"
#include "deep_ep/bootstrap.hpp"
#include "deep_ep/error.hpp"
#include "fabric/bootstrap_star.hpp"
#include "fabric/rendezvous.hpp"
#include "processes.hpp"
#include "refusal.hpp"

namespace deep_ep {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

/// A port that nobody listens on just now.
int free_port() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = loopback(0);
  socklen_t bytes = sizeof(address);
  EXPECT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  EXPECT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes), 0);
  close(fd);
  return ntohs(address.sin_port);
}

/// A connection to whoever comes to listen on the port.
int connect_to(int port) {
  const sockaddr_in address = loopback(port);
  const auto deadline = std::chrono::steady_clock::now() + milliseconds(5000);
  for (;;) {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) return fd;
    close(fd);
    if (std::chrono::steady_clock::now() > deadline) return -1;
    std::this_thread::sleep_for(milliseconds(10));
  }
}

/// Processes that are related by nothing but the port.
void in_processes(int count, const std::function<void(int)>& body) {
  std::vector<pid_t> pids;
  for (int i = 0; i < count; ++i) {
    const pid_t pid = fork();
    if (pid == 0) {
      try {
        body(i);
      } catch (const std::exception& error) {
        ADD_FAILURE() << "process " << i << ": " << error.what();
      }
      fflush(nullptr);
      _exit(::testing::Test::HasFailure() ? 1 : 0);
    }
    pids.push_back(pid);
  }
  for (int i = 0; i < count; ++i) {
    int status = -1;
    waitpid(pids[i], &status, 0);
    EXPECT_EQ(status, 0) << "process " << i;
  }
}

void expect_gather(Bootstrap& bootstrap) {
  const auto all = bootstrap.all_gather("rank " + std::to_string(bootstrap.rank()));
  ASSERT_EQ(all.size(), static_cast<std::size_t>(bootstrap.size()));
  for (int i = 0; i < bootstrap.size(); ++i) EXPECT_EQ(all[i], "rank " + std::to_string(i));
}

TEST(BootstrapTcp, EightRanksMeetAndGather) {
  const int port = free_port();
  in_processes(8, [port](int rank) {
    const auto bootstrap = bootstrap_tcp(rank, 8, "127.0.0.1", port, milliseconds(20000));
    for (int i = 0; i < 20; ++i) expect_gather(*bootstrap);
  });
}

TEST(BootstrapTcp, OneRankOpensNoSocket) {
  const auto bootstrap = bootstrap_tcp(0, 1, "no.such.host.invalid", 1);
  EXPECT_THAT(bootstrap->all_gather("x"), ElementsAre("x"));
}

TEST(BootstrapTcp, OthersWaitForALateRankZero) {
  const int port = free_port();
  in_processes(3, [port](int rank) {
    if (rank == 0) std::this_thread::sleep_for(milliseconds(700));
    expect_gather(*bootstrap_tcp(rank, 3, "localhost", port, milliseconds(20000)));
  });
}

TEST(BootstrapTcp, SamePortServesTheNextRendezvousAtOnce) {
  const int port = free_port();
  in_processes(3, [port](int rank) {
    for (int i = 0; i < 10; ++i)
      expect_gather(*bootstrap_tcp(rank, 3, "127.0.0.1", port, milliseconds(20000)));
  });
}

TEST(BootstrapTcp, MissingRankIsNamedToAllThatCame) {
  const int port = free_port();
  in_processes(3, [port](int process) {
    const int rank = process == 2 ? 3 : process;  // 2 of 0..3 never comes
    const std::string text =
        refusal([&] { bootstrap_tcp(rank, 4, "127.0.0.1", port, milliseconds(3000)); },
                ErrorCode::kTimeout);
    EXPECT_THAT(text, HasSubstr("rank 2 did not come within 3000 ms"));
  });
}

TEST(BootstrapTcp, MissingRankZeroIsNamed) {
  const int port = free_port();
  const std::string text = refusal(
      [&] { bootstrap_tcp(1, 2, "127.0.0.1", port, milliseconds(300)); }, ErrorCode::kTimeout);
  EXPECT_THAT(text, HasSubstr("could not reach rank 0 at 127.0.0.1:" + std::to_string(port)));
  EXPECT_THAT(text, HasSubstr("refused"));
}

TEST(BootstrapTcp, WrongSecretIsRefusedAndTheOthersMeet) {
  const int port = free_port();
  Gate refused;
  in_processes(3, [&](int process) {
    setenv("DEEP_EP_RENDEZVOUS_SECRET", process == 2 ? "wrong" : "right", 1);
    if (process == 2) {
      const std::string text =
          refusal([&] { bootstrap_tcp(1, 2, "127.0.0.1", port, milliseconds(20000)); },
                  ErrorCode::kDisagreement);
      EXPECT_THAT(text, HasSubstr("DEEP_EP_RENDEZVOUS_SECRET"));
      return refused.open();
    }
    if (process == 1) refused.wait();
    expect_gather(*bootstrap_tcp(process, 2, "127.0.0.1", port, milliseconds(20000)));
  });
}

/// As bootstrap_tcp of a rank that is not 0, and opens `came` when it is ahead of all that connect
/// from then on.
std::shared_ptr<Bootstrap> join_ahead(int rank, int size, int port, Gate& came) {
  fabric::Fd link(connect_to(port));
  fabric::Hello hello;
  hello.rank = rank;
  hello.size = size;
  EXPECT_EQ(send(link.get(), &hello, sizeof(hello), MSG_NOSIGNAL), ssize_t{sizeof(hello)});
  came.open();
  fabric::Answer answer;
  EXPECT_EQ(recv(link.get(), &answer, sizeof(answer), MSG_WAITALL), ssize_t{sizeof(answer)});
  EXPECT_EQ(answer.code, 0u);
  std::vector<fabric::Fd> links;
  links.push_back(std::move(link));
  return fabric::bootstrap_star(rank, size, std::move(links), milliseconds(20000));
}

TEST(BootstrapTcp, OtherWorldSizeAndSecondProcessOfARankAreRefused) {
  const int port = free_port();
  Gate came;
  Gate refused;
  in_processes(4, [&](int process) {
    const auto join = [port](int rank, int size) {
      expect_gather(*bootstrap_tcp(rank, size, "127.0.0.1", port, milliseconds(20000)));
    };
    if (process == 0) return join(0, 3);
    if (process == 1) return expect_gather(*join_ahead(1, 3, port, came));
    if (process == 2) {
      came.wait();
      EXPECT_THAT(refusal([&] { join(1, 3); }, ErrorCode::kDisagreement),
                  HasSubstr("another process has come as this rank"));
      return refused.open();
    }
    EXPECT_THAT(refusal([&] { join(2, 5); }, ErrorCode::kDisagreement),
                HasSubstr("counts 5 ranks, rank 0 counts 3"));
    refused.wait();
    join(2, 3);
  });
}

/// Two ranks meet though connections that say nothing, or nonsense, are there before the second,
/// and until they have met.
void meet_beside_strangers(int strangers, rlim_t files_of_rank_0) {
  const int port = free_port();
  Gate connected;
  Gate met;
  in_processes(3, [&](int process) {
    if (process < 2) {
      const rlimit files{files_of_rank_0, files_of_rank_0};
      if (process == 0) setrlimit(RLIMIT_NOFILE, &files);
      if (process == 1) connected.wait();
      expect_gather(*bootstrap_tcp(process, 2, "127.0.0.1", port, milliseconds(20000)));
      return met.open();
    }
    for (int i = 0; i < strangers; ++i) {
      const int fd = connect_to(port);
      ASSERT_GE(fd, 0);
      if (i % 2 == 0) send(fd, "GET / HTTP/1.0\r\nHost: somebody\r\n\r\n", 34, MSG_NOSIGNAL);
    }
    connected.open();
    met.wait(2);
  });
}

TEST(BootstrapTcp, StrangersThatSayNothingOrNonsenseChangeNothing) {
  meet_beside_strangers(20, 1024);
}
#if !defined(__SANITIZE_ADDRESS__)  // needs file descriptors itself
TEST(BootstrapTcp, MoreStrangersThanFileDescriptorsChangeNothing) {
  meet_beside_strangers(200, 40);
}
#endif

TEST(BootstrapTcp, PortIsClosedOnceAllHaveCome) {
  const int port = free_port();
  in_processes(2, [port](int rank) {
    const auto bootstrap = bootstrap_tcp(rank, 2, "127.0.0.1", port, milliseconds(20000));
    const sockaddr_in address = loopback(port);
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    EXPECT_NE(connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    bootstrap->barrier();
  });
}

TEST(BootstrapTcp, TakenPortIsAnErrorThatSaysWhatToSet) {
  const int port = free_port();
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  const sockaddr_in address = loopback(port);
  ASSERT_EQ(bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(fd, 1), 0);
  EXPECT_THAT(refusal([&] { bootstrap_tcp(0, 2, "127.0.0.1", port, milliseconds(500)); },
                      ErrorCode::kSystem),
              HasSubstr("MASTER_PORT"));
  close(fd);
}

TEST(BootstrapFromEnvironment, FindsThePlaceThatTheLauncherTold) {
  const std::string port = std::to_string(free_port());
  in_processes(2, [port](int rank) {
    setenv("RANK", std::to_string(rank).c_str(), 1);
    setenv("WORLD_SIZE", "2", 1);
    setenv("MASTER_PORT", port.c_str(), 1);
    const auto bootstrap = bootstrap_from_environment();
    EXPECT_EQ(bootstrap->rank(), rank);
    expect_gather(*bootstrap);
  });
}

TEST(BootstrapFromEnvironment, NoLauncherMeansOneRank) {
  for (const auto& variable : env::variables()) unsetenv(variable.name);
  EXPECT_EQ(bootstrap_from_environment()->size(), 1);
}

}  // namespace
}  // namespace deep_ep
