#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <iostream>

#include "base/env.hpp"
#include "base/error.hpp"
#include "deep_ep/bootstrap.hpp"
#include "fabric/bootstrap_star.hpp"

namespace deep_ep {
namespace {

using fabric::Fd;
using Main = std::function<int(std::shared_ptr<Bootstrap>)>;

/// Both ends of rank 0's link to each rank; made before the first fork, so that every rank has its.
struct Links {
  std::vector<Fd> at_root;
  std::vector<Fd> at_rank;

  explicit Links(int size) : at_root(size), at_rank(size) {
    for (int i = 1; i < size; ++i) {
      int pair[2];
      if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) throw_errno("socketpair");
      at_root[i] = Fd(pair[0]);
      at_rank[i] = Fd(pair[1]);
    }
  }

  /// What `rank` needs. The rest is closed, else the death of a rank would show to nobody.
  std::vector<Fd> keep(int rank) {
    std::vector<Fd> kept;
    if (rank == 0) {
      kept = std::move(at_root);
    } else {
      kept.push_back(std::move(at_rank[rank]));
    }
    at_root.clear();
    at_rank.clear();
    return kept;
  }
};

int run_rank(const Main& main, std::shared_ptr<Bootstrap> bootstrap) {
  const int rank = bootstrap->rank();
  try {
    const int status = main(std::move(bootstrap));
    // The system keeps 8 bits; a failure must not become a success.
    return status != 0 && (status & 0xff) == 0 ? 1 : status;
  } catch (const std::exception& error) {
    std::cerr << fmt::format("rank {}: {}\n", rank, error.what());
  } catch (...) {
    std::cerr << fmt::format("rank {}: unknown exception\n", rank);
  }
  return 1;
}

[[noreturn]] void child(int rank, pid_t parent, Links& links, const Main& main) noexcept {
  // From here on the kernel ends this process with its parent; if the parent has gone already, it
  // will not.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(128 + SIGKILL);
  const int size = static_cast<int>(links.at_root.size());
  const std::chrono::milliseconds timeout(env::timeout_ms());
  const int status = run_rank(main, fabric::bootstrap_star(rank, size, links.keep(rank), timeout));
  std::cout.flush();
  std::fflush(nullptr);
  _exit(status);
}

int wait_for(pid_t pid) {
  int status = 0;
  while (waitpid(pid, &status, 0) < 0) {
    if (errno != EINTR) throw_errno("waitpid");
  }
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/// Ends what was started if run_forked itself fails.
struct Children {
  std::vector<pid_t> pids;
  ~Children() {
    for (const pid_t pid : pids) kill(pid, SIGKILL);
    for (const pid_t pid : pids) {
      while (waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
      }
    }
  }
};

}  // namespace

std::vector<RankExit> run_forked(int size, const Main& main,
                                 const std::function<void(std::span<const int>)>& started) {
  require(size >= 1, "size: {} is not allowed, must be at least 1", size);
  env::timeout_ms();  // a bad value is refused once, here, not by every rank
  Links links(size);
  // Else each rank would print again what is still in the buffers.
  std::cout.flush();
  std::fflush(nullptr);
  const pid_t parent = getpid();
  Children children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t pid = fork();
    if (pid < 0) throw_errno(fmt::format("fork of rank {} of {}", rank, size));
    if (pid == 0) child(rank, parent, links, main);
    children.pids.push_back(pid);
  }
  links.at_root.clear();
  links.at_rank.clear();
  if (started) started(children.pids);
  std::vector<RankExit> exits;
  while (!children.pids.empty()) {
    exits.push_back({static_cast<int>(exits.size()), wait_for(children.pids.front())});
    children.pids.erase(children.pids.begin());
  }
  return exits;
}

}  // namespace deep_ep
