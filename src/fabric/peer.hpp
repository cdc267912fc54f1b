#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "fabric/link.hpp"
#include "fabric/memory.hpp"

namespace deep_ep::fabric {

/// One other rank, as this rank's Fabric sees it. Guarded by the Fabric's mutex, but for
/// `mappings`, which only the helper thread touches while it runs.
struct Peer {
  int rank = -1;
  Fd link;      ///< empty once the peer is gone
  Fd lifetime;  ///< readable when its process has ended, even if a child of it still holds the link
  bool ready = false;  ///< it has told all segments that it had when the link was made
  bool orderly = false;
  std::vector<std::shared_ptr<Mapping>> mappings;

  /// Sends now or, if the link is full, when flush() finds room. A peer that is gone is no error.
  void post(const std::string& packet, int fd);
  /// Sends what waits. True when nothing is left.
  bool flush();
  bool has_waiting() const { return !outbox_.empty(); }
  void hang_up();

 private:
  struct Waiting {
    std::string packet;
    Fd fd;
  };
  std::deque<Waiting> outbox_;
};

/// A descriptor that is readable when the process at the other end of a Unix socket has ended;
/// empty if that process is this one or the system cannot tell.
Fd watch_process_behind(int link);

}  // namespace deep_ep::fabric
