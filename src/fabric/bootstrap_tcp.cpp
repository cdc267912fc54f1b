#include "base/env.hpp"
#include "base/error.hpp"
#include "deep_ep/bootstrap.hpp"
#include "fabric/bootstrap_star.hpp"
#include "fabric/rendezvous.hpp"

namespace deep_ep {

std::shared_ptr<Bootstrap> bootstrap_tcp(int rank, int size, const std::string& address, int port,
                                         std::chrono::milliseconds timeout) {
  require(size >= 1, "size: {} is not allowed, must be at least 1", size);
  require(rank >= 0 && rank < size, "rank: {} is not allowed, must be from 0 to {}", rank,
          size - 1);
  require(port >= 1 && port <= 65535, "port: {} is not allowed, must be from 1 to 65535", port);
  env::require_timeout(timeout, 1);
  const fabric::Rendezvous rendezvous{rank, size, address, port, env::rendezvous_secret(), timeout};
  require(rendezvous.secret.size() <= fabric::Hello::kMaxSecret,
          "DEEP_EP_RENDEZVOUS_SECRET: {} bytes are not allowed, must be at most {}",
          rendezvous.secret.size(), +fabric::Hello::kMaxSecret);
  std::vector<fabric::Fd> links;
  if (size > 1 && rank == 0) links = fabric::gather_ranks(rendezvous);
  if (rank > 0) links.push_back(fabric::join_root(rendezvous));
  return fabric::bootstrap_star(rank, size, std::move(links), timeout);
}

}  // namespace deep_ep
