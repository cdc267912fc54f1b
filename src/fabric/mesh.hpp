#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "fabric/socket.hpp"

namespace deep_ep::fabric {

/// Boot id and network namespace: equal where sockets and memory are shared.
std::string host_id();
/// Of this process on its host: equal for ranks that are threads of it.
std::string process_id();

/// Where one rank can be reached by the others of its node.
struct PeerAddress {
  int rank = 0;
  int pid = 0;
  unsigned uid = 0;
  std::string host;       ///< host_id()
  std::string host_name;  ///< for error texts
  std::string pid_space;  ///< process ids mean the same where it is equal
  std::string socket;     ///< random name of an abstract Unix socket
  std::string cookie;     ///< what a caller must show to be let in

  std::string encode() const;
  /// Throws Error(kDisagreement) if `text` is not what encode() of rank `rank` gives.
  static PeerAddress decode(const std::string& text, int rank);
};

/// This rank's listening socket; peers are let in only by join_mesh.
struct Door {
  Fd listener;
  PeerAddress address;

  explicit Door(int rank);
};

/// Throws Error(kUnsupported) naming who is where, unless all ranks are of one host and user.
void require_one_host(const std::vector<PeerAddress>& addresses);

/// Connects each pair of ranks: this rank calls those below it and is called by those above it.
/// Element i is the (packet) socket to rank i. Throws Error(kTimeout / kPeerFailed) naming ranks.
std::vector<Fd> join_mesh(const Door& door, const std::vector<PeerAddress>& addresses,
                          std::chrono::milliseconds timeout);

}  // namespace deep_ep::fabric
