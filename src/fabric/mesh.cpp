#include "fabric/mesh.hpp"

#include <fmt/ranges.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <thread>

#include "base/error.hpp"
#include "fabric/bootstrap_star.hpp"

namespace deep_ep::fabric {
namespace {

constexpr const char* kFormat = "deep_ep_fabric_2";
constexpr std::size_t kSecretBytes = 16;
constexpr std::chrono::milliseconds kCausePatience{100};

struct Hello {
  static constexpr std::uint32_t kMagic = 0xdee9e902;
  std::uint32_t magic = kMagic;
  std::int32_t rank = 0;
  char cookie[2 * kSecretBytes] = {};
};

std::string namespace_id(const char* path) {
  struct stat status {};
  if (stat(path, &status) != 0) throw_errno(fmt::format("stat({})", path));
  return std::to_string(status.st_ino);
}

std::string host_name() {
  char name[HOST_NAME_MAX + 1] = {};
  gethostname(name, sizeof(name) - 1);
  return *name == '\0' ? "unknown" : name;
}

Fd packet_socket() {
  Fd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw_errno("socket(AF_UNIX)");
  return fd;
}

/// Abstract names begin with a zero byte, live in no file system and go with their socket.
socklen_t abstract_address(const std::string& name, sockaddr_un& address) {
  address = {};
  address.sun_family = AF_UNIX;
  require(name.size() + 1 < sizeof(address.sun_path), "socket name: {} bytes are too many",
          name.size());
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

bool is_same_user(int fd) {
  ucred credentials{};
  socklen_t bytes = sizeof(credentials);
  return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &bytes) == 0 &&
         credentials.uid == geteuid();
}

class Mesh {
 public:
  Mesh(const Door& door, const std::vector<PeerAddress>& addresses,
       std::chrono::milliseconds timeout)
      : door_(door),
        addresses_(addresses),
        timeout_(timeout),
        deadline_(timeout),
        links_(addresses.size()) {}

  std::vector<Fd> run() {
    const int rank = door_.address.rank;
    watch_peers();
    for (int j = 0; j < rank; ++j) links_[j] = call(addresses_[j]);
    while (!missing().empty()) {
      if (deadline_.expired()) {
        const std::vector<int> ranks = missing();
        throw Error(ErrorCode::kTimeout,
                    fmt::format("rank {}: {} did not connect within {} ms", rank, name_ranks(ranks),
                                timeout_.count()),
                    ranks);
      }
      answer();
    }
    return std::move(links_);
  }

 private:
  /// A rank that dies now may be one that never calls here, or whose death keeps others from
  /// calling.
  void watch_peers() {
    for (const PeerAddress& peer : addresses_) {
      if (peer.pid_space != door_.address.pid_space || peer.pid == door_.address.pid) continue;
      Fd process(static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0)));
      if (process) {
        processes_.push_back({peer.rank, std::move(process)});
      } else if (errno == ESRCH) {
        ended_.insert(peer.rank);
      }
    }
    if (!ended_.empty()) fail_for_ended(*ended_.begin());
  }

  /// `peer` has left or died. It may have left because another one died, whose end may show here
  /// a little later: all that have ended by then are named.
  [[noreturn]] void fail_for_ended(int peer) {
    ended_.insert(peer);
    const Deadline patience(kCausePatience);
    while (ended_.size() < processes_.size() && !patience.expired()) {
      for (const Watched& one : processes_) {
        pollfd polled{one.process.get(), POLLIN, 0};
        if (poll(&polled, 1, 0) > 0) ended_.insert(one.rank);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    const std::vector<int> ranks(ended_.begin(), ended_.end());
    throw Error(
        ErrorCode::kPeerFailed,
        fmt::format("rank {}: cannot connect to rank {}: it has left or died{}", door_.address.rank,
                    peer, ranks.size() == 1 ? "" : "; gone are " + name_ranks(ranks)),
        ranks);
  }

  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int i = door_.address.rank + 1; i < static_cast<int>(links_.size()); ++i) {
      if (!links_[i]) ranks.push_back(i);
    }
    return ranks;
  }

  Fd call(const PeerAddress& peer) {
    Fd fd = packet_socket();
    sockaddr_un address{};
    const socklen_t bytes = abstract_address(peer.socket, address);
    while (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), bytes) != 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN) fail_for_ended(peer.rank);
      // Its queue of callers is full.
      if (deadline_.expired()) fail(ErrorCode::kTimeout, peer.rank, "does not answer");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (!is_same_user(fd.get())) fail(ErrorCode::kPeerFailed, peer.rank, "is of another user");
    Hello hello;
    hello.rank = door_.address.rank;
    std::memcpy(hello.cookie, peer.cookie.data(), sizeof(hello.cookie));
    // The first packet of a connection always has room.
    if (send(fd.get(), &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello))
      fail_for_ended(peer.rank);
    return fd;
  }

  [[noreturn]] void fail(ErrorCode code, int peer, const char* why) const {
    throw Error(
        code,
        fmt::format("rank {}: cannot connect to rank {}: it {}", door_.address.rank, peer, why),
        {peer});
  }

  void answer() {
    std::vector<pollfd> polled{{door_.listener.get(), POLLIN, 0}};
    for (const Fd& caller : callers_) polled.push_back({caller.get(), POLLIN, 0});
    const std::size_t first_process = polled.size();
    for (const Watched& one : processes_) polled.push_back({one.process.get(), POLLIN, 0});
    if (poll(polled.data(), polled.size(), deadline_.poll_ms()) <= 0) return;
    for (std::size_t i = 0; i < processes_.size(); ++i) {
      if (polled[first_process + i].revents != 0) fail_for_ended(processes_[i].rank);
    }
    for (std::size_t i = 0; i < callers_.size(); ++i) {
      if (polled[1 + i].revents != 0) admit(callers_[i]);
    }
    std::erase_if(callers_, [](const Fd& caller) { return !caller; });
    if (polled[0].revents == 0) return;
    Fd caller(accept4(door_.listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    // Other users are turned away before a byte of theirs is read.
    if (caller && is_same_user(caller.get())) callers_.push_back(std::move(caller));
  }

  /// Leaves `caller` empty: it has become a link or is hung up on.
  void admit(Fd& caller) {
    Fd link = std::exchange(caller, Fd());
    Hello hello;
    const ssize_t got = recv(link.get(), &hello, sizeof(hello), 0);
    const std::string& cookie = door_.address.cookie;
    if (got != sizeof(hello) || hello.magic != Hello::kMagic) return;
    if (std::memcmp(hello.cookie, cookie.data(), sizeof(hello.cookie)) != 0) return;
    if (hello.rank <= door_.address.rank || hello.rank >= static_cast<int>(links_.size())) return;
    if (links_[hello.rank]) return;
    links_[hello.rank] = std::move(link);
  }

  const Door& door_;
  const std::vector<PeerAddress>& addresses_;
  std::chrono::milliseconds timeout_;
  Deadline deadline_;
  std::vector<Fd> links_;
  std::vector<Fd> callers_;
  struct Watched {
    int rank;
    Fd process;
  };
  std::vector<Watched> processes_;
  std::set<int> ended_;
};

}  // namespace

std::string PeerAddress::encode() const {
  return fmt::format("{} {} {} {} {} {} {} {} {}", kFormat, rank, pid, uid, host, host_name, socket,
                     cookie, pid_space);
}

PeerAddress PeerAddress::decode(const std::string& text, int rank) {
  std::istringstream words(text);
  std::string format;
  PeerAddress address;
  words >> format >> address.rank >> address.pid >> address.uid >> address.host >>
      address.host_name >> address.socket >> address.cookie >> address.pid_space;
  if (!words || format != kFormat || address.rank != rank ||
      address.cookie.size() != 2 * kSecretBytes)
    throw Error(
        ErrorCode::kDisagreement,
        fmt::format("what rank {} exported ({} bytes) is not an address of that rank; do all "
                    "ranks run the same version of the library?",
                    rank, text.size()),
        {rank});
  return address;
}

std::string host_id() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  return fmt::format("{}/{}", boot.empty() ? "unknown" : boot, namespace_id("/proc/self/ns/net"));
}

std::string process_id() {
  return fmt::format("{}/{}/{}", host_id(), namespace_id("/proc/self/ns/pid"), getpid());
}

Door::Door(int rank) : listener(packet_socket()) {
  address.rank = rank;
  address.pid = getpid();
  address.uid = geteuid();
  address.host = host_id();
  address.host_name = host_name();
  address.pid_space = namespace_id("/proc/self/ns/pid");
  address.socket = "deep_ep." + to_hex(random_bytes(kSecretBytes));
  address.cookie = to_hex(random_bytes(kSecretBytes));
  sockaddr_un name{};
  const socklen_t bytes = abstract_address(address.socket, name);
  if (bind(listener.get(), reinterpret_cast<const sockaddr*>(&name), bytes) != 0)
    throw_errno("bind of an abstract Unix socket");
  if (listen(listener.get(), SOMAXCONN) != 0) throw_errno("listen on an abstract Unix socket");
}

void require_one_host(const std::vector<PeerAddress>& addresses) {
  std::map<std::string, std::vector<int>> hosts;
  for (const PeerAddress& address : addresses) hosts[address.host].push_back(address.rank);
  if (hosts.size() > 1) {
    std::vector<std::string> places;
    for (const auto& [host, ranks] : hosts)
      places.push_back(fmt::format("{} on {} ({})", name_ranks(ranks),
                                   addresses[ranks.front()].host_name, host));
    throw Error(
        ErrorCode::kUnsupported,
        fmt::format("the ranks are on {} hosts or network namespaces, which needs internode "
                    "mode: {}",
                    hosts.size(), fmt::join(places, "; ")));
  }
  for (const PeerAddress& address : addresses) {
    if (address.uid != addresses.front().uid)
      throw Error(ErrorCode::kUnsupported,
                  fmt::format("rank {} runs as user {}, rank 0 as user {}; memory is shared among "
                              "processes of one user only",
                              address.rank, address.uid, addresses.front().uid),
                  {address.rank});
  }
}

std::vector<Fd> join_mesh(const Door& door, const std::vector<PeerAddress>& addresses,
                          std::chrono::milliseconds timeout) {
  return Mesh(door, addresses, timeout).run();
}

}  // namespace deep_ep::fabric
