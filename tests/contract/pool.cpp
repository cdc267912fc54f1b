#include "contract/pool.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "deep_ep/error.hpp"

namespace deep_ep::test {
namespace {

enum class Kind : std::uint32_t { kJob, kAnswer, kFailure, kGather, kGathered, kRefused };

struct Header {
  Kind kind;
  std::uint32_t num_ranks;  // kJob
  std::uint64_t members;    // kGather: bit mask
  std::uint64_t bytes;
};

struct Message {
  Header header{};
  std::string text;
};

bool write_all(int socket, const char* data, std::size_t bytes) {
  while (bytes > 0) {
    const ssize_t done = send(socket, data, bytes, MSG_NOSIGNAL);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return false;
    data += done;
    bytes -= static_cast<std::size_t>(done);
  }
  return true;
}

bool read_all(int socket, char* data, std::size_t bytes) {
  while (bytes > 0) {
    const ssize_t done = recv(socket, data, bytes, 0);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return false;
    data += done;
    bytes -= static_cast<std::size_t>(done);
  }
  return true;
}

bool send_message(int socket, Header header, std::string_view text) {
  header.bytes = text.size();
  return write_all(socket, reinterpret_cast<const char*>(&header), sizeof header) &&
         write_all(socket, text.data(), text.size());
}

/// False when the other side is gone.
bool read_message(int socket, Message& message) {
  if (!read_all(socket, reinterpret_cast<char*>(&message.header), sizeof message.header))
    return false;
  message.text.resize(message.header.bytes);
  return read_all(socket, message.text.data(), message.text.size());
}

std::string pack(const std::map<int, std::string>& parts) {
  std::string packed;
  for (const auto& [rank, bytes] : parts) {
    const std::uint64_t size = bytes.size();
    packed.append(reinterpret_cast<const char*>(&size), sizeof size).append(bytes);
  }
  return packed;
}

std::vector<std::string> unpack(const std::string& packed) {
  std::vector<std::string> parts;
  for (std::size_t at = 0; at < packed.size();) {
    std::uint64_t size = 0;
    packed.copy(reinterpret_cast<char*>(&size), sizeof size, at);
    parts.push_back(packed.substr(at + sizeof size, size));
    at += sizeof size + size;
  }
  return parts;
}

/// The rank's side: takes jobs until the parent closes the socket.
class RankProcess final : public Worker {
 public:
  RankProcess(int rank, int socket) : rank_(rank), socket_(socket) {}

  void serve(const Pool::Work& work) {
    Message message;
    while (read_message(socket_, message)) {
      num_ranks_ = static_cast<int>(message.header.num_ranks);
      Header reply{Kind::kAnswer, 0, 0, 0};
      std::string text;
      try {
        text = work(*this, message.text);
      } catch (const std::exception& error) {
        reply.kind = Kind::kFailure;
        text = error.what();
      }
      if (!send_message(socket_, reply, text)) return;
    }
  }

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }

  std::shared_ptr<Bootstrap> bootstrap() override {
    std::vector<int> all;
    for (int i = 0; i < num_ranks_; ++i) all.push_back(i);
    return bootstrap_among(all);
  }

  std::shared_ptr<Bootstrap> bootstrap_among(const std::vector<int>& ranks) override {
    const auto place = std::find(ranks.begin(), ranks.end(), rank_);
    std::uint64_t members = 0;
    for (int rank : ranks) members |= std::uint64_t{1} << rank;
    return bootstrap_callback(
        static_cast<int>(place - ranks.begin()), static_cast<int>(ranks.size()),
        [this, members](std::string_view bytes) { return gather(members, bytes); });
  }

 private:
  std::vector<std::string> gather(std::uint64_t members, std::string_view bytes) {
    Message reply;
    if (!send_message(socket_, {Kind::kGather, 0, members, 0}, bytes) ||
        !read_message(socket_, reply))
      throw Error(ErrorCode::kPeerFailed, "the pool's parent is gone");
    if (reply.header.kind == Kind::kRefused) throw Error(ErrorCode::kPeerFailed, reply.text);
    return unpack(reply.text);
  }

  int rank_;
  int socket_;
  int num_ranks_ = 0;
};

std::string describe_exit(int status) {
  if (WIFSIGNALED(status))
    return fmt::format("killed by signal {} ({})", WTERMSIG(status), strsignal(WTERMSIG(status)));
  return fmt::format("ended with status {}", WEXITSTATUS(status));
}

}  // namespace

struct Pool::Job {
  std::vector<Outcome> outcomes;
  std::vector<bool> running;
  Gatherings gatherings;

  bool done() const { return std::find(running.begin(), running.end(), true) == running.end(); }
};

Pool::Pool(int num_ranks, Work work)
    : work_(std::move(work)), ranks_(static_cast<std::size_t>(num_ranks)) {
  for (int rank = 0; rank < num_ranks; ++rank) start(rank);
}

Pool::~Pool() {
  for (std::size_t rank = 0; rank < ranks_.size(); ++rank) {
    if (ranks_[rank].socket >= 0) close(ranks_[rank].socket);  // ends serve()
    ranks_[rank].socket = -1;
  }
  for (const Rank& rank : ranks_) {
    if (rank.pid > 0) waitpid(rank.pid, nullptr, 0);
  }
}

void Pool::start(int rank) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
    perror("socketpair");
    std::abort();
  }
  std::fflush(nullptr);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    for (const Rank& other : ranks_) {
      if (other.socket >= 0) close(other.socket);
    }
    close(pair[0]);
    RankProcess(rank, pair[1]).serve(work_);
    std::fflush(nullptr);
    _exit(0);
  }
  close(pair[1]);
  ranks_[static_cast<std::size_t>(rank)] = {pid, pair[0]};
  fresh_ = true;
}

void Pool::stop(int rank) {
  Rank& it = ranks_[static_cast<std::size_t>(rank)];
  kill(it.pid, SIGKILL);
  waitpid(it.pid, nullptr, 0);
  close(it.socket);
  it = {};
}

std::vector<Outcome> Pool::run(int num_ranks, const std::string& job_text,
                               std::chrono::milliseconds limit) {
  const int size = static_cast<int>(ranks_.size());
  for (int rank = 0; rank < size; ++rank) {
    if (ranks_[static_cast<std::size_t>(rank)].pid < 0) start(rank);
  }
  const auto count = static_cast<std::size_t>(num_ranks);
  Job job{std::vector<Outcome>(count), std::vector<bool>(count, true), {}};
  for (std::size_t rank = 0; rank < count; ++rank) {
    send_message(ranks_[rank].socket, {Kind::kJob, static_cast<std::uint32_t>(num_ranks), 0, 0},
                 job_text);
  }
  fresh_ = false;
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!job.done()) {
    std::vector<pollfd> polled;
    for (std::size_t rank = 0; rank < count; ++rank)
      polled.push_back({job.running[rank] ? ranks_[rank].socket : -1, POLLIN, 0});
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) break;
    if (poll(polled.data(), polled.size(), static_cast<int>(left.count())) < 0) continue;
    for (std::size_t rank = 0; rank < count; ++rank) {
      if (polled[rank].revents != 0) receive(job, static_cast<int>(rank));
    }
  }
  if (!job.done()) {
    for (std::size_t rank = 0; rank < count; ++rank)
      job.outcomes[rank].timed_out = job.running[rank];
    for (int rank = 0; rank < size; ++rank) {
      if (ranks_[static_cast<std::size_t>(rank)].pid > 0) stop(rank);
    }
  }
  for (const Rank& rank : ranks_) fresh_ = fresh_ || rank.pid < 0;
  return job.outcomes;
}

void Pool::receive(Job& job, int rank) {
  const auto at = static_cast<std::size_t>(rank);
  Outcome& outcome = job.outcomes[at];
  Message message;
  if (!read_message(ranks_[at].socket, message)) {
    int status = 0;
    waitpid(ranks_[at].pid, &status, 0);
    close(ranks_[at].socket);
    ranks_[at] = {};
    job.running[at] = false;
    outcome.signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    outcome.failure = describe_exit(status);
    refuse_gatherings(job, rank);
    return;
  }
  if (message.header.kind == Kind::kGather) {
    join_gathering(job, rank, message.header.members, std::move(message.text));
    return;
  }
  outcome.answered = message.header.kind == Kind::kAnswer;
  (outcome.answered ? outcome.answer : outcome.failure) = std::move(message.text);
  job.running[at] = false;
  refuse_gatherings(job, rank);
}

void Pool::join_gathering(Job& job, int rank, std::uint64_t members, std::string bytes) {
  auto& parts = job.gatherings[members];
  parts[rank] = std::move(bytes);
  std::uint64_t joined = 0;
  for (const auto& [member, part] : parts) joined |= std::uint64_t{1} << member;
  if (joined == members) {
    const std::string packed = pack(parts);
    for (const auto& [member, part] : parts)
      send_message(ranks_[static_cast<std::size_t>(member)].socket, {Kind::kGathered, 0, 0, 0},
                   packed);
    job.gatherings.erase(members);
    return;
  }
  for (std::size_t member = 0; member < job.running.size(); ++member) {
    if ((members >> member & 1) != 0 && !job.running[member]) {
      refuse_gatherings(job, static_cast<int>(member));
      return;
    }
  }
}

/// A rank that left the job will never join: whoever waits for it is told.
void Pool::refuse_gatherings(Job& job, int leaver) {
  for (auto it = job.gatherings.begin(); it != job.gatherings.end();) {
    if ((it->first >> leaver & 1) == 0) {
      ++it;
      continue;
    }
    for (const auto& [member, part] : it->second) {
      if (member == leaver || !job.running[static_cast<std::size_t>(member)]) continue;
      send_message(ranks_[static_cast<std::size_t>(member)].socket, {Kind::kRefused, 0, 0, 0},
                   fmt::format("rank {} left the job", leaver));
    }
    it = job.gatherings.erase(it);
  }
}

}  // namespace deep_ep::test
