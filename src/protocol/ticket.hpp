#pragma once

#include <cstdint>

#include "protocol/atomic.hpp"

namespace deep_ep::protocol {

/// Hands out 0, 1, 2, ... once each. Order of work, not of memory: what a ticket's holder reads
/// must have been published to it some other way.
struct alignas(128) TicketCounter {
  std::uint64_t next;

  DEEP_EP_HD std::uint64_t take() { return add_relaxed(&next, std::uint64_t{1}); }
};

}  // namespace deep_ep::protocol
