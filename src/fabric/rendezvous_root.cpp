#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <thread>

#include "base/error.hpp"
#include "base/log.hpp"
#include "fabric/bootstrap_star.hpp"
#include "fabric/rendezvous.hpp"

namespace deep_ep::fabric {
namespace {

using std::chrono::milliseconds;

Fd bind_and_listen(int family, const sockaddr* address, socklen_t bytes) {
  Fd fd(socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return fd;
  const int on = 1;
  setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (bind(fd.get(), address, bytes) != 0 || listen(fd.get(), SOMAXCONN) != 0) fd.reset();
  return fd;
}

/// Listens on the named address only; on all addresses where the name is not one of this machine's,
/// as behind address translation.
Fd open_listener(const Rendezvous& at) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int status =
      getaddrinfo(at.address.c_str(), std::to_string(at.port).c_str(), &hints, &found);
  require(status == 0, "address: '{}' cannot be resolved: {}", at.address, gai_strerror(status));
  Fd fd;
  int error = 0;
  for (const addrinfo* entry = found; entry != nullptr && !fd; entry = entry->ai_next) {
    fd = bind_and_listen(entry->ai_family, entry->ai_addr, entry->ai_addrlen);
    if (!fd) error = errno;
  }
  freeaddrinfo(found);
  if (!fd && error == EADDRNOTAVAIL) {
    log::info("rendezvous: {} is not an address of this machine, listening on all", at.address);
    sockaddr_in any{};
    any.sin_family = AF_INET;
    any.sin_port = htons(static_cast<std::uint16_t>(at.port));
    fd = bind_and_listen(AF_INET, reinterpret_cast<const sockaddr*>(&any), sizeof(any));
    error = errno;
  }
  if (!fd) {
    errno = error;
    throw_errno(
        fmt::format("rendezvous: rank 0 cannot listen on {} (another port: MASTER_PORT or "
                    "DEEP_EP_RENDEZVOUS_PORT)",
                    at.where()));
  }
  return fd;
}

bool equal_in_constant_time(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned char difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  return difference == 0;
}

void send_answer(int fd, std::uint32_t code, const std::string& text) {
  Answer answer;
  answer.code = code;
  answer.text_bytes =
      static_cast<std::uint32_t>(std::min<std::size_t>(text.size(), answer.kMaxText));
  std::string out(reinterpret_cast<const char*>(&answer), sizeof(answer));
  out.append(text, 0, answer.text_bytes);
  // A fresh connection has room for it; whoever does not read is not waited for.
  send_all(fd, out.data(), out.size(), Deadline(milliseconds(100)));
}

/// A connection that has not said who it is.
struct Candidate {
  Fd fd;
  std::string received;

  enum class State { kIncomplete, kComplete, kGone };
  State read() {
    char buffer[512];
    const ssize_t got = recv(fd.get(), buffer, sizeof(buffer), 0);
    if (got < 0) return errno == EAGAIN || errno == EINTR ? State::kIncomplete : State::kGone;
    if (got == 0) return State::kGone;
    received.append(buffer, static_cast<std::size_t>(got));
    if (received.size() < sizeof(Hello)) return State::kIncomplete;
    const Hello head = hello();
    if (head.magic != Hello::kMagic || head.secret_bytes > Hello::kMaxSecret) return State::kGone;
    return received.size() < sizeof(Hello) + head.secret_bytes ? State::kIncomplete
                                                               : State::kComplete;
  }
  Hello hello() const {
    Hello head;
    std::memcpy(&head, received.data(), sizeof(head));
    return head;
  }
  std::string_view secret() const { return std::string_view(received).substr(sizeof(Hello)); }
};

class Root {
 public:
  explicit Root(const Rendezvous& at) : at_(at), links_(at.size) {}

  std::vector<Fd> run() {
    listener_ = open_listener(at_);
    const Deadline deadline(at_.timeout);
    while (!missing().empty()) {
      if (deadline.expired()) give_up();
      turn(deadline);
    }
    // Before the welcomes: a rank that has been welcomed may come again for a next rendezvous.
    listener_.reset();
    for (int i = 1; i < at_.size; ++i) send_answer(links_[i].get(), 0, "");
    return std::move(links_);
  }

 private:
  // Strangers that say nothing cannot take all of the process's file descriptors.
  static constexpr std::size_t kMaxCandidates = 4096;

  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int i = 1; i < at_.size; ++i) {
      if (!links_[i]) ranks.push_back(i);
    }
    return ranks;
  }

  void turn(const Deadline& deadline) {
    std::vector<pollfd> polled{{listener_.get(), POLLIN, 0}};
    for (const Candidate& candidate : candidates_)
      polled.push_back({candidate.fd.get(), POLLIN, 0});
    // A rank that died while it waited may be started again, so its place becomes free.
    for (int i = 1; i < at_.size; ++i) polled.push_back({links_[i].get(), POLLRDHUP, 0});
    if (poll(polled.data(), polled.size(), deadline.poll_ms()) <= 0) return;
    const std::size_t first_link = 1 + candidates_.size();
    for (int i = 1; i < at_.size; ++i) {
      if (polled[first_link + i - 1].revents != 0) links_[i].reset();
    }
    std::vector<Candidate> waiting;
    for (std::size_t i = 0; i < candidates_.size(); ++i) {
      Candidate& candidate = candidates_[i];
      const auto state =
          polled[1 + i].revents == 0 ? Candidate::State::kIncomplete : candidate.read();
      if (state == Candidate::State::kComplete) admit(candidate);
      if (state == Candidate::State::kIncomplete) waiting.push_back(std::move(candidate));
    }
    candidates_ = std::move(waiting);
    if (polled[0].revents != 0) accept_one();
  }

  void accept_one() {
    Fd fd(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) {
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) make_room();
      return;
    }
    shortage_.clear();
    const int on = 1;
    setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd.get(), SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    if (candidates_.size() == kMaxCandidates) candidates_.erase(candidates_.begin());
    candidates_.push_back({std::move(fd), {}});
  }

  /// Nobody can be accepted, for want of file descriptors say: whoever has said nothing for longest
  /// goes.
  void make_room() {
    shortage_ = std::generic_category().message(errno);
    if (!candidates_.empty()) {
      candidates_.erase(candidates_.begin());
      return;
    }
    std::this_thread::sleep_for(milliseconds(10));
  }

  void admit(Candidate& candidate) {
    const Hello hello = candidate.hello();
    std::string why;
    if (!equal_in_constant_time(candidate.secret(), at_.secret)) {
      why = "its DEEP_EP_RENDEZVOUS_SECRET is not that of rank 0";
    } else if (hello.size != at_.size) {
      why = fmt::format("it counts {} ranks, rank 0 counts {}", hello.size, at_.size);
    } else if (hello.rank < 1 || hello.rank >= at_.size) {
      why = fmt::format("its rank must be from 1 to {}", at_.size - 1);
    } else if (links_[hello.rank]) {
      why = "another process has come as this rank";
    }
    if (why.empty()) {
      links_[hello.rank] = std::move(candidate.fd);
      return;
    }
    why = fmt::format("rendezvous at {}: rank {} was refused: {}", at_.where(), hello.rank, why);
    log::warn("{}", why);
    last_refusal_ = why;
    send_answer(candidate.fd.get(), static_cast<std::uint32_t>(ErrorCode::kDisagreement), why);
  }

  [[noreturn]] void give_up() {
    if (!shortage_.empty()) last_refusal_ = "rank 0 could not accept a rank: " + shortage_;
    const std::vector<int> ranks = missing();
    const std::string text = fmt::format("rendezvous at {}: {} did not come within {} ms{}{}",
                                         at_.where(), name_ranks(ranks), at_.timeout.count(),
                                         last_refusal_.empty() ? "" : "; ", last_refusal_);
    for (const Fd& link : links_) {
      if (link) send_answer(link.get(), static_cast<std::uint32_t>(ErrorCode::kTimeout), text);
    }
    throw Error(ErrorCode::kTimeout, text, ranks);
  }

  const Rendezvous& at_;
  Fd listener_;
  std::vector<Fd> links_;
  std::vector<Candidate> candidates_;
  std::string last_refusal_;
  std::string shortage_;  // why nobody can be accepted
};

}  // namespace

std::vector<Fd> gather_ranks(const Rendezvous& rendezvous) { return Root(rendezvous).run(); }

}  // namespace deep_ep::fabric
