#include "backend/host/internode_ll/state.hpp"

#include <algorithm>
#include <optional>

#include "base/env.hpp"
#include "base/log.hpp"
#include "protocol/atomic.hpp"

namespace deep_ep::host::internode_ll {

using plan::LowLatencyKind;

namespace {

// To see whether a rank moves: a wait's beat takes up to 100 ms.
constexpr std::chrono::milliseconds kShortestLook{200};

}  // namespace

State::State(Context& context, const BackendOptions& options)
    : context_(context),
      bytes_(options.low_latency_bytes),
      enable_shrink_(options.enable_shrink),
      layouts_(options.num_ranks),
      first_ticket_(env::first_ticket()),
      tickets_{first_ticket_, first_ticket_},
      masked_(options.num_ranks),
      scratch_(context.pool().size()) {
  for (int i = 0; i < num_ranks(); ++i) order_of_sending_.push_back((rank() + 1 + i) % num_ranks());
  std::stable_partition(order_of_sending_.begin(), order_of_sending_.end(),
                        [this](int rank) { return remote(rank); });
}

void State::open() {
  const std::int64_t begin = Context::control_bytes(context_.topology());
  for (int i = 0; i < num_ranks(); ++i) carve(i, context_.fabric().base(i, 0) + begin);
}

void State::open(internode::State& network) {
  network_ = &network;
  std::byte* const mirror = network.low_latency_part(context_.rank()) + bytes_;
  for (int i = 0; i < num_ranks(); ++i)
    carve(i, remote(i) ? mirror : network.low_latency_part(context_.topology().index_of(i)));
}

void State::wait_consumed(const Call& call, LowLatencyKind kind, std::uint64_t ticket) {
  if (ticket < first_ticket_ + 2) return;
  const std::uint64_t before = ticket - 2;
  const auto consumed = [&](int rank) {
    // acquire: pairs with publish_consumed() of the reader.
    return masked(rank) || own().consumed_by(kind, ticket, rank).reached(before);
  };
  wait(
      call, "the call before the last to be received",
      [&] {
        for (int i = 0; i < num_ranks(); ++i)
          if (!consumed(i)) return false;
        return true;
      },
      [&] {
        std::vector<Missing> missing;
        for (int i = 0; i < num_ranks(); ++i)
          if (!consumed(i))
            missing.push_back({i, before, own().consumed_by(kind, ticket, i).seen()});
        return missing;
      });
  if (network_ != nullptr) reclaim_mirror(call);
}

// I21: whoever has read a ticket has got its bytes; this waits until the transport knows, too.
void State::reclaim_mirror(const Call& call) {
  using std::chrono::milliseconds;
  using std::chrono::steady_clock;
  const auto end = steady_clock::now() + call.timeout;
  for (int i = 0; i < num_ranks(); ++i) {
    if (!remote(i) || masked(i)) continue;
    const auto left = std::chrono::ceil<milliseconds>(end - steady_clock::now());
    try {
      (void)network_->flush(call, i, std::max(left, kShortestLook));
    } catch (const Error& error) {
      if (!is_absence(error)) throw;
      mask_all({i}, error);
      context_.announce_end_of_wait();
    }
  }
}

// Also at masked ranks: they may be let in again.
void State::publish_consumed(LowLatencyKind kind, std::uint64_t ticket) {
  scrub(kind, ticket);
  for (const int to : order_of_sending_) {
    if (remote(to)) {
      // release: pairs with wait_consumed() there.
      network_->signal(to, &own().consumed_by(kind, ticket, rank()).value, ticket);
      continue;
    }
    layouts_[to].consumed_by(kind, ticket, rank()).publish(ticket);
    ring_doorbell(to);
  }
}

// A tag means a ticket of 2^32 - 1 calls ago as well: by then every packet that was not written
// again has been cleared, a stripe at each call (I14).
void State::scrub(LowLatencyKind kind, std::uint64_t ticket) {
  constexpr std::int64_t kCallsOfAParity = std::int64_t{1} << 16;
  const std::int64_t packets =
      own().packet_part_bytes / static_cast<std::int64_t>(sizeof(plan::Packet));
  const std::int64_t stripe = (packets + kCallsOfAParity - 1) / kCallsOfAParity;
  const std::int64_t begin = static_cast<std::int64_t>(ticket / 2 % kCallsOfAParity) * stripe;
  auto* packet = reinterpret_cast<plan::Packet*>(
      own().packets + plan::LowLatencyLayout::part(kind, ticket) * own().packet_part_bytes);
  for (std::int64_t i = begin; i < std::min(begin + stripe, packets); ++i)
    protocol::store_relaxed(&packet[i].tag, std::uint32_t{0});
}

/// That ranks are gone or late, and nothing worse: they may be masked.
bool State::is_absence(const Error& error) {
  return enable_shrink_ && !context_.faulted() &&
         (error.code() == ErrorCode::kTimeout || error.code() == ErrorCode::kPeerFailed);
}

// A rank that is missing may itself wait for one that is lost: until it has masked that one. So
// after the timeout this one looks a while longer at whose wait goes on: a mark alone may be that
// of a rank that was stopped in its wait. Whoever has left this rank out waits as well, for others:
// so not for ever.
void State::wait_without(const Call& call, Error error,
                         const std::function<void(const Call&)>& wait,
                         const std::function<std::vector<Missing>()>& missing) {
  const auto try_wait = [&](const Call& again) -> std::optional<Error> {
    try {
      wait(again);
      context_.announce_end_of_wait();  // that of the wait that threw
      return std::nullopt;
    } catch (const Error& next) {
      if (!is_absence(next)) throw;
      return next;
    }
  };
  for (int times = 0;;) {
    std::vector<std::uint64_t> marks(num_ranks());
    bool looked = error.code() == ErrorCode::kTimeout;
    if (looked) {
      for (int i = 0; i < num_ranks(); ++i) marks[i] = context_.wait_mark(i);
      Call look = call;
      look.timeout = std::max(call.timeout / 4, kShortestLook);
      const std::optional<Error> end = try_wait(look);
      if (!end) return;
      looked = end->code() == ErrorCode::kTimeout;  // to the end: nobody died meanwhile
    }
    times += looked ? 1 : 0;
    // Longer for who has left out somebody that is there: that one waits for it, and others may
    // wait for that one.
    int patience = 3;
    for (int i = 0; i < num_ranks(); ++i) patience += masked(i) && !context_.gone(i) ? 1 : 0;
    const std::vector<Missing> absent = missing();
    std::vector<int> lost;
    for (const auto& [rank, expected, seen] : absent) {
      const bool waits = context_.wait_mark(rank) != marks[rank];
      if (context_.gone(rank) || (looked && (!waits || times >= patience))) lost.push_back(rank);
    }
    std::erase(lost, rank());
    // Nobody can be left out for it, so it would not end.
    if (lost.empty() && looked && times >= patience && !absent.empty()) throw Error(error);
    mask_all(lost, error);
    if (!lost.empty()) {
      times = 0;
      context_.announce_end_of_wait();  // it need not have to wait again
    }
    const std::optional<Error> next = try_wait(call);
    if (!next) return;
    error = *next;
  }
}

void State::mask_all(const std::vector<int>& ranks, const Error& error) {
  for (const int rank : ranks) {
    mask(rank, true);
    log::warn("rank {} leaves rank {} out of low latency from here on: {}", this->rank(), rank,
              error.what());
  }
}

}  // namespace deep_ep::host::internode_ll
