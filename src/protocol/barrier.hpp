#pragma once

#include <cstdint>

#include "protocol/epoch.hpp"
#include "protocol/wait.hpp"

namespace deep_ep::protocol {

/// acquire: pairs with each rank's publish of its flag.
DEEP_EP_HD inline bool all_reached(const EpochFlag* flags, int num_ranks, std::uint64_t epoch) {
  for (int i = 0; i < num_ranks; ++i) {
    if (!flags[i].reached(epoch)) return false;
  }
  return true;
}

/// One flag a rank and peer: `arrived_at_peer(i)` lies in rank i's memory at this rank's place,
/// `arrived_here[i]` here. Everything done before by any rank is visible to every rank behind it.
template <class Waiter, class FlagAtPeer, class Ring>
DEEP_EP_HD WaitResult barrier(Waiter& waiter, int num_ranks, std::uint64_t epoch,
                              FlagAtPeer&& arrived_at_peer, const EpochFlag* arrived_here,
                              Ring&& ring) {
  for (int i = 0; i < num_ranks; ++i) {
    arrived_at_peer(i)->publish(epoch);
    ring(i);
  }
  return wait_until(waiter, [&] { return all_reached(arrived_here, num_ranks, epoch); });
}

}  // namespace deep_ep::protocol
