#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "fabric/socket.hpp"

namespace deep_ep::fabric {

/// What two connected ranks tell each other, one packet each.
struct Message {
  enum class Kind : std::uint32_t {
    kSegment,  ///< `segment` exists: descriptor, with a file descriptor
    kReady,    ///< all segments that existed when the link was made have been told
    kGoodbye,  ///< the sender closes its Fabric
  };
  Kind kind = Kind::kReady;
  std::int32_t segment = -1;
  std::string descriptor{};

  std::string encode() const;
};

enum class SendResult { kSent, kBlocked, kGone };

/// Never blocks. `fd` goes along with the packet unless it is negative; the caller keeps its own.
SendResult send_packet(int link, const std::string& packet, int fd);

struct Received {
  enum class State { kMessage, kNothing, kClosed };
  State state = State::kNothing;
  Message message{};
  Fd fd{};
};

/// Never blocks. kClosed: the other end is gone, and everything that it sent has been read.
Received receive_packet(int link);

}  // namespace deep_ep::fabric
