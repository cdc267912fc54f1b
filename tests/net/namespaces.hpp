#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fabric/socket.hpp"

namespace deep_ep::net {

/// Why this machine cannot make Namespaces; empty if it can.
std::string why_no_namespaces();

/// The same of Namespaces::disturb().
std::string why_no_netem();

/// Nodes on one machine: a network namespace each, joined by a bridge in one more. A node has its
/// loopback and one device, kDevice, with an MTU of 9000. Nothing leads out of them. Descriptors of
/// this process and of its forks keep them, so they are gone with the last of these, however it
/// ends. What changes them must be called by a thread that may move between namespaces: it is back
/// when the call returns.
class Namespaces {
 public:
  static constexpr const char* kDevice = "net0";
  static std::string address(int node) { return "10.77.0." + std::to_string(node + 1); }

  /// Throws Error(kSystem) with the command that failed.
  explicit Namespaces(int nodes);

  int nodes() const { return static_cast<int>(nodes_.size()); }
  /// The calling thread, and those that it starts, live on `node` from now on.
  void enter(int node) const;
  /// Runs a shell command on `node`.
  void run(int node, const std::string& command) const;
  /// Plugs in or pulls the cable of `node`, at the bridge's side.
  void set_link(int node, bool up) const;
  /// Loses all that goes to and comes from `node` from now on, or no more. Its device shows
  /// nothing.
  void set_silent(int node, bool silent) const;
  /// Limits what goes to and comes from `node`; `rate` and `queue` in words of tc: "2gbit". What
  /// finds no room in the queue is lost.
  void shape(int node, const std::string& rate,
             const std::string& queue = "burst 256kb latency 50ms") const;
  /// Disturbs what goes to and comes from `node`; in words of tc: "delay 5ms loss 1%". Needs
  /// why_no_netem() to be empty.
  void disturb(int node, const std::string& netem) const;
  /// As it was before shape() or disturb().
  void smooth(int node) const;

  /// All bytes that crossed the node's device so far, headers included.
  struct Traffic {
    std::int64_t received = 0;
    std::int64_t sent = 0;
  };
  Traffic traffic(int node) const;
  /// Processes that live on any of the nodes.
  std::vector<int> inhabitants() const;

 private:
  void set_discipline(int node, const std::string& words) const;

  fabric::Fd hub_;
  std::vector<fabric::Fd> nodes_;
};

/// Moves this rank to its node, where UCX has nothing but TCP over the node's device.
void live_on(const Namespaces& nodes, int node);

}  // namespace deep_ep::net

/// At the beginning of a test: skips it, and says why, where there can be no Namespaces.
#define NEEDS_NAMESPACES() \
  if (const std::string why = deep_ep::net::why_no_namespaces(); !why.empty()) GTEST_SKIP() << why
