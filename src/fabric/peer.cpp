#include "fabric/peer.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace deep_ep::fabric {

void Peer::post(const std::string& packet, int fd) {
  if (!link) return;
  if (outbox_.empty() && send_packet(link.get(), packet, fd) != SendResult::kBlocked) return;
  outbox_.push_back({packet, Fd(fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0))});
}

bool Peer::flush() {
  while (!outbox_.empty()) {
    const Waiting& next = outbox_.front();
    if (link && send_packet(link.get(), next.packet, next.fd.get()) == SendResult::kBlocked)
      return false;
    outbox_.pop_front();
  }
  return true;
}

void Peer::hang_up() {
  link.reset();
  lifetime.reset();
  outbox_.clear();
}

Fd watch_process_behind(int link) {
  ucred credentials{};
  socklen_t bytes = sizeof(credentials);
  if (getsockopt(link, SOL_SOCKET, SO_PEERCRED, &credentials, &bytes) != 0) return Fd();
  // 0: a process that this namespace does not see.
  if (credentials.pid <= 0 || credentials.pid == getpid()) return Fd();
  return Fd(static_cast<int>(syscall(SYS_pidfd_open, credentials.pid, 0)));
}

}  // namespace deep_ep::fabric
