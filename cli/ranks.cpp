#include "ranks.hpp"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/env.hpp"
#include "base/error.hpp"
#include "fabric/socket.hpp"

namespace deep_ep::cli {
namespace {

/// Memory of the parent and all forked ranks: the first failure's text. When one rank fails, all
/// others fail because of it, and the first account is the one to read.
struct Board {
  std::atomic<int> failures;
  int rank;
  char text[4096];
};
static_assert(std::atomic<int>::is_always_lock_free, "used between processes");

class SharedBoard {
 public:
  SharedBoard() {
    void* memory =
        mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw_errno("mmap");
    board_ = static_cast<Board*>(memory);
  }
  ~SharedBoard() { munmap(board_, sizeof(Board)); }
  SharedBoard(const SharedBoard&) = delete;
  SharedBoard& operator=(const SharedBoard&) = delete;

  Board* operator->() const { return board_; }

  void write(int rank, const char* what) const {
    if (board_->failures.fetch_add(1) > 0) return;
    board_->rank = rank;
    std::strncpy(board_->text, what, sizeof board_->text - 1);
  }

 private:
  Board* board_;
};

/// Kills ranks that go on long after another one has failed: a stopped process, say, which no
/// timeout of its own ends.
class Watchdog {
 public:
  explicit Watchdog(const SharedBoard& board) : board_(board), timeout_(env::timeout_ms()) {}
  ~Watchdog() {
    over_ = true;
    if (thread_.joinable()) thread_.join();
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// Descriptors, since numbers of processes that have ended may be others' by then.
  void watch(std::span<const int> pids) {
    for (const int pid : pids)
      processes_.emplace_back(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
    thread_ = std::thread([this] { run(); });
  }

 private:
  void run() {
    std::optional<fabric::Deadline> deadline;
    for (; !over_; std::this_thread::sleep_for(std::chrono::milliseconds(50))) {
      if (board_->failures.load() == 0) continue;
      if (!deadline) deadline.emplace(timeout_);
      if (!deadline->expired()) continue;
      fmt::print(stderr, "error: {} ms after the first failure the ranks that go on are killed\n",
                 timeout_.count());
      for (const fabric::Fd& process : processes_)
        syscall(SYS_pidfd_send_signal, process.get(), SIGKILL, nullptr, 0);
      return;
    }
  }

  const SharedBoard& board_;
  const std::chrono::milliseconds timeout_;
  std::vector<fabric::Fd> processes_;
  std::atomic<bool> over_{false};
  std::thread thread_;
};

int report(const SharedBoard& board, const std::vector<RankExit>& exits) {
  int status = 0;
  for (const RankExit& exit : exits) {
    status = std::max(status, exit.status);
    if (exit.status > 128)
      fmt::print(stderr, "error: rank {} was killed by signal {} ({})\n", exit.rank,
                 exit.status - 128, strsignal(exit.status - 128));
  }
  const int failures = board->failures.load();
  if (failures > 0) {
    const std::string others =
        failures > 1 ? fmt::format(" (and {} more)", failures - 1) : std::string();
    fmt::print(stderr, "error: rank {}{}: {}\n", board->rank, others, board->text);
  }
  return std::min(status, 1);
}

}  // namespace

int count_ranks(int asked, int preset) {
  if (const auto launch = env::launch()) {
    require(asked == 0 || asked == launch->size,
            "--ranks {} contradicts the launcher, which started {} ranks", asked, launch->size);
    return launch->size;
  }
  require(asked >= 0, "--ranks {} must be at least 1", asked);
  return asked == 0 ? preset : asked;
}

int run_ranks(int ranks, const std::function<int(std::shared_ptr<Bootstrap>)>& body) {
  if (const auto launch = env::launch()) {
    try {
      return body(bootstrap_from_environment());
    } catch (const std::exception& error) {
      fmt::print(stderr, "error: rank {}: {}\n", launch->rank, error.what());
      return 1;
    }
  }
  const SharedBoard board;
  // Lines that are still in a buffer would be printed by every child.
  std::fflush(nullptr);
  std::optional<Watchdog> watchdog(std::in_place, board);
  const auto exits = run_forked(
      ranks,
      [&](std::shared_ptr<Bootstrap> bootstrap) {
        try {
          return body(bootstrap);
        } catch (const std::exception& error) {
          board.write(bootstrap->rank(), error.what());
          return 1;
        }
      },
      [&](std::span<const int> pids) { watchdog->watch(pids); });
  watchdog.reset();
  return report(board, exits);
}

}  // namespace deep_ep::cli
