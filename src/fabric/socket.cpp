#include "fabric/socket.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"

namespace deep_ep::fabric {

void Fd::reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

Deadline::Deadline(std::chrono::milliseconds timeout) {
  // A year, so that "for ever" in milliseconds does not overflow the clock's nanoseconds.
  const std::chrono::milliseconds longest = std::chrono::hours(24 * 365);
  end_ = std::chrono::steady_clock::now() + std::min(timeout, longest);
}

int Deadline::poll_ms() const {
  const auto left =
      std::chrono::ceil<std::chrono::milliseconds>(end_ - std::chrono::steady_clock::now());
  // An hour at most: callers poll in a loop.
  return static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, 3'600'000));
}

namespace {

/// Calls `move(offset)`, a send or recv of the rest, until `bytes` have moved.
template <class Move>
Io move_all(int fd, short events, std::size_t bytes, const Deadline& deadline, Move&& move) {
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t moved = move(done);
    if (moved > 0) {
      done += static_cast<std::size_t>(moved);
      continue;
    }
    if (moved < 0 && errno == EINTR) continue;
    if (moved == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) return Io::kClosed;
    pollfd entry{fd, events, 0};
    if (poll(&entry, 1, deadline.poll_ms()) == 0 && deadline.expired()) return Io::kExpired;
  }
  return Io::kDone;
}

}  // namespace

Io send_all(int fd, const void* data, std::size_t bytes, const Deadline& deadline) {
  const auto* from = static_cast<const std::byte*>(data);
  return move_all(fd, POLLOUT, bytes, deadline, [&](std::size_t done) {
    return send(fd, from + done, bytes - done, MSG_NOSIGNAL);
  });
}

Io receive_all(int fd, void* data, std::size_t bytes, const Deadline& deadline) {
  auto* to = static_cast<std::byte*>(data);
  return move_all(fd, POLLIN, bytes, deadline,
                  [&](std::size_t done) { return recv(fd, to + done, bytes - done, 0); });
}

void set_nonblocking(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) throw_errno("fcntl(O_NONBLOCK)");
}

std::string random_bytes(std::size_t count) {
  std::string bytes(count, '\0');
  // Requests of up to 256 bytes are not cut short.
  if (getrandom(bytes.data(), count, 0) != static_cast<ssize_t>(count)) throw_errno("getrandom");
  return bytes;
}

std::string to_hex(const std::string& bytes) {
  std::string hex;
  for (const char byte : bytes) hex += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  return hex;
}

}  // namespace deep_ep::fabric
