#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <system_error>
#include <thread>

#include "base/error.hpp"
#include "fabric/rendezvous.hpp"

namespace deep_ep::fabric {
namespace {

using std::chrono::milliseconds;

/// Beyond the timeout, for rank 0's verdict, which names the rank that is really missing.
constexpr milliseconds kVerdictGrace{2000};

std::string describe(int error) {
  return std::error_code(error, std::generic_category()).message();
}

/// A port in the range from which the system takes local ports can connect to itself while nobody
/// listens there.
bool is_connected_to_itself(int fd) {
  sockaddr_storage own{};
  sockaddr_storage other{};
  socklen_t own_bytes = sizeof(own);
  socklen_t other_bytes = sizeof(other);
  return getsockname(fd, reinterpret_cast<sockaddr*>(&own), &own_bytes) == 0 &&
         getpeername(fd, reinterpret_cast<sockaddr*>(&other), &other_bytes) == 0 &&
         own_bytes == other_bytes && std::memcmp(&own, &other, own_bytes) == 0;
}

class Joiner {
 public:
  explicit Joiner(const Rendezvous& at) : at_(at), deadline_(at.timeout) {}

  Fd run() {
    milliseconds pause{5};
    while (true) {
      Fd fd = connect_once();
      if (fd && introduce(fd.get())) return fd;
      if (deadline_.expired()) {
        throw Error(ErrorCode::kTimeout,
                    fmt::format("rendezvous: rank {} could not reach rank 0 at {} within {} ms: {}",
                                at_.rank, at_.where(), at_.timeout.count(), obstacle_),
                    {0});
      }
      std::this_thread::sleep_for(std::min(pause, milliseconds(deadline_.poll_ms())));
      pause = std::min(pause * 2, milliseconds(200));
    }
  }

 private:
  Fd connect_once() {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    const int status =
        getaddrinfo(at_.address.c_str(), std::to_string(at_.port).c_str(), &hints, &found);
    if (status != 0) {
      obstacle_ = fmt::format("'{}' cannot be resolved: {}", at_.address, gai_strerror(status));
      return Fd();
    }
    Fd fd;
    for (const addrinfo* entry = found; entry != nullptr && !fd; entry = entry->ai_next)
      fd = connect_to(*entry);
    freeaddrinfo(found);
    return fd;
  }

  Fd connect_to(const addrinfo& entry) {
    Fd fd(socket(entry.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) {
      if (errno == EAFNOSUPPORT || errno == EPROTONOSUPPORT) return fd;  // there may be others
      throw_errno("socket");
    }
    int error = 0;
    if (connect(fd.get(), entry.ai_addr, entry.ai_addrlen) != 0) {
      error = errno;
      if (error == EINPROGRESS) {
        // Bounded, since an address that drops packets must not hide the next one.
        pollfd polled{fd.get(), POLLOUT, 0};
        const int ready = poll(&polled, 1, std::min(deadline_.poll_ms(), 3000));
        socklen_t bytes = sizeof(error);
        if (ready <= 0) {
          error = ETIMEDOUT;
        } else {
          getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &bytes);
        }
      }
    }
    if (error == 0 && is_connected_to_itself(fd.get())) error = ECONNREFUSED;
    if (error != 0) {
      obstacle_ = describe(error);
      return Fd();
    }
    const int on = 1;
    setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd.get(), SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    return fd;
  }

  /// False: the connection ended, as that of a listener that is being closed does.
  bool introduce(int fd) {
    Hello hello;
    hello.rank = at_.rank;
    hello.size = at_.size;
    hello.secret_bytes = static_cast<std::uint32_t>(at_.secret.size());
    std::string out(reinterpret_cast<const char*>(&hello), sizeof(hello));
    out += at_.secret;
    const Deadline deadline(milliseconds(deadline_.poll_ms()) + kVerdictGrace);
    Answer answer;
    Io io = send_all(fd, out.data(), out.size(), deadline);
    if (io == Io::kDone) io = receive_all(fd, &answer, sizeof(answer), deadline);
    obstacle_ = io == Io::kExpired ? "it accepted the connection, then did not answer"
                                   : "it closed the connection";
    if (io != Io::kDone) return false;
    if (answer.magic != Hello::kMagic || answer.text_bytes > Answer::kMaxText)
      throw Error(ErrorCode::kDisagreement,
                  fmt::format("rendezvous: what listens at {} is not rank 0 but another program; "
                              "set MASTER_PORT or DEEP_EP_RENDEZVOUS_PORT to a free port",
                              at_.where()));
    std::string text(answer.text_bytes, '\0');
    if (receive_all(fd, text.data(), text.size(), deadline) != Io::kDone) return false;
    if (answer.code != 0) throw Error(static_cast<ErrorCode>(answer.code), text);
    return true;
  }

  const Rendezvous& at_;
  Deadline deadline_;
  std::string obstacle_ = "it was not there";
};

}  // namespace

Fd join_root(const Rendezvous& rendezvous) { return Joiner(rendezvous).run(); }

}  // namespace deep_ep::fabric
