#include "namespaces.hpp"

#include <fcntl.h>
#include <sched.h>
#include <spawn.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/error.hpp"

namespace deep_ep::net {
namespace {

using fabric::Fd;

Fd current() {
  Fd fd(open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC));
  if (!fd) throw_errno("open(/proc/thread-self/ns/net)");
  return fd;
}

void move_to(const Fd& space) {
  if (setns(space.get(), CLONE_NEWNET) != 0) throw_errno("setns(CLONE_NEWNET)");
}

/// The calling thread lives elsewhere for a while.
class Visit {
 public:
  explicit Visit(const Fd& space) : home_(current()) { move_to(space); }
  ~Visit() { setns(home_.get(), CLONE_NEWNET); }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

 private:
  Fd home_;
};

Fd make() {
  const Visit back(current());
  if (unshare(CLONE_NEWNET) != 0) throw_errno("unshare(CLONE_NEWNET)");
  return current();
}

void shell(const std::string& command) {
  std::string text = command;
  char name[] = "sh";
  char option[] = "-c";
  char* const arguments[] = {name, option, text.data(), nullptr};
  pid_t pid = 0;
  if (posix_spawn(&pid, "/bin/sh", nullptr, nullptr, arguments, environ) != 0)
    throw_errno("posix_spawn(/bin/sh)");
  int status = 0;
  while (waitpid(pid, &status, 0) < 0) {
    if (errno != EINTR) throw_errno("waitpid");
  }
  if (status != 0)
    throw Error(ErrorCode::kSystem, fmt::format("'{}' ended with status {}", command, status));
}

}  // namespace

std::string why_no_namespaces() {
  if (geteuid() != 0) return "only root can make network namespaces";
  try {
    make();
    shell("command -v ip tc bridge >/dev/null");
  } catch (const Error& error) {
    return fmt::format("{} (Debian: iproute2)", error.what());
  }
  return "";
}

std::string why_no_netem() {
  if (std::string why = why_no_namespaces(); !why.empty()) return why;
  const Namespaces one(1);
  try {
    one.disturb(0, "delay 1ms");
  } catch (const Error& error) {
    return fmt::format("the kernel has no netem (CONFIG_NET_SCH_NETEM): {}", error.what());
  }
  return "";
}

Namespaces::Namespaces(int nodes) : hub_(make()), nodes_(static_cast<std::size_t>(nodes)) {
  const Visit visit(hub_);
  shell("ip link add hub mtu 9000 type bridge && ip link set hub up");
  for (int node = 0; node < nodes; ++node) {
    nodes_[node] = make();
    shell(
        fmt::format("ip link add port{0} mtu 9000 type veth peer name {1} mtu 9000 netns "
                    "/proc/{2}/fd/{3} && ip link set port{0} master hub up",
                    node, kDevice, getpid(), nodes_[node].get()));
    run(node,
        fmt::format("ip address add {0}/24 dev {1} && ip link set {1} up && ip link set lo up",
                    address(node), kDevice));
  }
}

void Namespaces::enter(int node) const {
  move_to(nodes_.at(node));
  // UCX looks for devices in /sys, which shows those of the namespace that mounted it.
  if (unshare(CLONE_NEWNS) != 0) throw_errno("unshare(CLONE_NEWNS)");
  if (mount("none", "/", nullptr, MS_SLAVE | MS_REC, nullptr) != 0) throw_errno("mount(/)");
  if (mount("sysfs", "/sys", "sysfs", MS_RDONLY, nullptr) != 0) throw_errno("mount(/sys)");
}

void Namespaces::run(int node, const std::string& command) const {
  const Visit visit(nodes_.at(node));
  shell(command);
}

void Namespaces::set_link(int node, bool up) const {
  const Visit visit(hub_);
  shell(fmt::format("ip link set port{} {}", node, up ? "up" : "down"));
}

void Namespaces::set_silent(int node, bool silent) const {
  const Visit visit(hub_);
  shell(
      fmt::format("bridge link set dev port{} state {}", node, silent ? "disabled" : "forwarding"));
}

void Namespaces::set_discipline(int node, const std::string& words) const {
  run(node, fmt::format("tc qdisc {}", fmt::format(fmt::runtime(words), kDevice)));
  const Visit visit(hub_);
  shell(fmt::format("tc qdisc {}", fmt::format(fmt::runtime(words), fmt::format("port{}", node))));
}

void Namespaces::shape(int node, const std::string& rate, const std::string& queue) const {
  set_discipline(node, fmt::format("replace dev {{}} root tbf rate {} {}", rate, queue));
}

void Namespaces::disturb(int node, const std::string& netem) const {
  set_discipline(node, fmt::format("replace dev {{}} root netem {}", netem));
}

void Namespaces::smooth(int node) const { set_discipline(node, "del dev {} root"); }

Namespaces::Traffic Namespaces::traffic(int node) const {
  const Visit visit(nodes_.at(node));
  std::ifstream file("/proc/thread-self/net/dev");
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(':');
    if (colon == line.npos || line.find(kDevice) == line.npos) continue;
    std::istringstream numbers(line.substr(colon + 1));
    std::int64_t columns[9] = {};  // received: bytes and 7 more; sent: bytes, ...
    for (std::int64_t& column : columns) numbers >> column;
    return {columns[0], columns[8]};
  }
  throw Error(ErrorCode::kSystem, fmt::format("no {} in /proc/thread-self/net/dev", kDevice));
}

std::vector<int> Namespaces::inhabitants() const {
  std::vector<int> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (name.find_first_not_of("0123456789") != name.npos) continue;
    struct stat theirs {};
    if (stat((entry.path() / "ns/net").c_str(), &theirs) != 0) continue;  // it has ended
    for (const Fd& node : nodes_) {
      struct stat here {};
      if (fstat(node.get(), &here) != 0) throw_errno("fstat(namespace)");
      if (theirs.st_dev == here.st_dev && theirs.st_ino == here.st_ino)
        found.push_back(std::stoi(name));
    }
  }
  return found;
}

void live_on(const Namespaces& nodes, int node) {
  nodes.enter(node);
  // Before any thread was started.
  setenv("UCX_TLS", "tcp", 1);                        // NOLINT(concurrency-mt-unsafe)
  setenv("UCX_NET_DEVICES", Namespaces::kDevice, 1);  // NOLINT(concurrency-mt-unsafe)
}

}  // namespace deep_ep::net
