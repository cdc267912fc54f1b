#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/host/context.hpp"
#include "protocol/ticket.hpp"

namespace deep_ep::host::internode_ll {

/// Items 0 .. count - 1 that move `bytes` in all.
struct Work {
  std::int64_t count = 0;
  std::int64_t bytes = 0;
};

/// Runs body(thread, begin, end) over parts of the items, on as many threads as there is work for.
/// Everything that the threads wrote is visible to the caller then.
template <class Body>
void share(Context& context, const Call& call, const Work& work, Body&& body) {
  // Less than this per thread is done before another thread has woken up.
  constexpr std::int64_t kBytesPerThread = 512 << 10;
  constexpr std::int64_t kItemsPerTicket = 8;
  const auto threads = static_cast<int>(std::clamp<std::int64_t>(
      work.bytes / kBytesPerThread, 1, std::min(context.pool().size(), call.num_threads)));
  if (threads == 1) return body(0, 0, work.count);
  protocol::TicketCounter tickets{};
  context.pool().run(threads, [&](int thread) {
    for (;;) {
      const auto begin = static_cast<std::int64_t>(tickets.take()) * kItemsPerTicket;
      if (begin >= work.count) return;
      body(thread, begin, std::min(begin + kItemsPerTicket, work.count));
    }
  });
}

}  // namespace deep_ep::host::internode_ll
