#include "backend/host/internode_ll/state.hpp"

#include <algorithm>

#include "base/env.hpp"
#include "base/log.hpp"
#include "protocol/atomic.hpp"

namespace deep_ep::host::internode_ll {

using plan::LowLatencyKind;

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
  for (int i = 0; i < num_ranks(); ++i) {
    if (!remote(i) || masked(i)) continue;
    try {
      (void)network_->flush(call, i);
    } catch (const Error& error) {
      if (!mask_missing(error, {{i, 1, 0}})) throw;
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

namespace {

// Of `ranks` those that are missing.
std::vector<int> missing_of(std::vector<int> ranks, const std::vector<Missing>& missing) {
  std::erase_if(ranks, [&](int rank) {
    return std::none_of(missing.begin(), missing.end(),
                        [&](const Missing& one) { return one.rank == rank; });
  });
  return ranks;
}

}  // namespace

// Who is missing waits for a rank that is not missing here. Either that one is lost, and whoever is
// missing leaves it out at about this time, and comes; or the mark is old: who is missing was
// stopped in its wait, and the other has come since.
bool State::may_still_come(const Error& error, const std::vector<Missing>& missing) const {
  return enable_shrink_ && error.code() == ErrorCode::kTimeout && !error.ranks().empty() &&
         missing_of(error.ranks(), missing).empty();
}

// Masks those of the missing that the Error blames, or all.
bool State::mask_missing(const Error& error, const std::vector<Missing>& missing) {
  const bool absent = error.code() == ErrorCode::kTimeout || error.code() == ErrorCode::kPeerFailed;
  if (!enable_shrink_ || !absent || context_.own().fault->load() != protocol::FaultRecord::kNone)
    return false;
  std::vector<int> ranks = missing_of(error.ranks(), missing);
  if (ranks.empty()) {
    for (const Missing& one : missing) ranks.push_back(one.rank);
  }
  std::erase(ranks, rank());
  for (const int rank : ranks) {
    mask(rank, true);
    log::warn("rank {} leaves rank {} out of low latency from here on: {}", this->rank(), rank,
              error.what());
  }
  return !ranks.empty();
}

}  // namespace deep_ep::host::internode_ll
