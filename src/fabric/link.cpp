#include "fabric/link.hpp"

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

#include "base/error.hpp"

namespace deep_ep::fabric {
namespace {

struct Head {
  static constexpr std::uint32_t kMagic = 0xdee9e903;
  std::uint32_t magic = kMagic;
  Message::Kind kind{};
  std::int32_t segment = -1;
};

constexpr std::size_t kMaxPacket = 4096;

/// Room for one file descriptor beside a packet.
union Control {
  cmsghdr align;
  char bytes[CMSG_SPACE(sizeof(int))];
};

Fd take_fd(msghdr& header) {
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(part), sizeof(fd));
    return Fd(fd);
  }
  return Fd();
}

}  // namespace

std::string Message::encode() const {
  Head head;
  head.kind = kind;
  head.segment = segment;
  std::string packet(reinterpret_cast<const char*>(&head), sizeof(head));
  packet += descriptor;
  require(packet.size() <= kMaxPacket, "descriptor: {} bytes are not allowed, must be at most {}",
          descriptor.size(), kMaxPacket - sizeof(Head));
  return packet;
}

SendResult send_packet(int link, const std::string& packet, int fd) {
  iovec piece{const_cast<char*>(packet.data()), packet.size()};
  msghdr header{};
  header.msg_iov = &piece;
  header.msg_iovlen = 1;
  Control control{};
  if (fd >= 0) {
    header.msg_control = control.bytes;
    header.msg_controllen = sizeof(control.bytes);
    cmsghdr* part = CMSG_FIRSTHDR(&header);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(part), &fd, sizeof(fd));
  }
  while (sendmsg(link, &header, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
    if (errno == EINTR) continue;
    // ETOOMANYREFS: too many file descriptors of this user are on their way.
    if (errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM || errno == ETOOMANYREFS)
      return SendResult::kBlocked;
    return SendResult::kGone;
  }
  return SendResult::kSent;
}

Received receive_packet(int link) {
  char buffer[kMaxPacket];
  iovec piece{buffer, sizeof(buffer)};
  Control control{};
  while (true) {
    msghdr header{};
    header.msg_iov = &piece;
    header.msg_iovlen = 1;
    header.msg_control = control.bytes;
    header.msg_controllen = sizeof(control.bytes);
    const ssize_t got = recvmsg(link, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    // ECONNRESET comes once, ahead of packets that are still to be read, when the other end closed
    // with unread packets of its own.
    if (got < 0 && (errno == EINTR || errno == ECONNRESET)) continue;
    if (got < 0) return {errno == EAGAIN ? Received::State::kNothing : Received::State::kClosed};
    if (got == 0) return {Received::State::kClosed};
    Head head;
    if (static_cast<std::size_t>(got) < sizeof(head)) return {Received::State::kClosed};
    std::memcpy(&head, buffer, sizeof(head));
    Received received{Received::State::kMessage, {}, take_fd(header)};
    if (head.magic != Head::kMagic) return {Received::State::kClosed};
    received.message.kind = head.kind;
    received.message.segment = head.segment;
    received.message.descriptor.assign(buffer + sizeof(head),
                                       static_cast<std::size_t>(got) - sizeof(head));
    return received;
  }
}

}  // namespace deep_ep::fabric
