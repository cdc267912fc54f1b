#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "deep_ep/bootstrap.hpp"
#include "fabric/socket.hpp"

namespace deep_ep::fabric {

/// A Bootstrap over connected stream sockets: rank 0 collects everybody's bytes and sends all to
/// all. `links` holds one socket for each rank at rank 0 (element 0 unused), and at other ranks
/// only element 0. A failed all_gather breaks it for good: what is in the sockets is out of step
/// then.
std::shared_ptr<Bootstrap> bootstrap_star(int rank, int size, std::vector<Fd> links,
                                          std::chrono::milliseconds timeout);

/// "rank 3" or "ranks 3, 5"
std::string name_ranks(const std::vector<int>& ranks);

}  // namespace deep_ep::fabric
