#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "deep_ep/bootstrap.hpp"
#include "namespaces.hpp"

namespace deep_ep::bench {

/// A text that a forked rank leaves in a pipe, short enough to fit in there.
class Answer {
 public:
  Answer();
  ~Answer();
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;
  void give(const std::string& text);
  std::string take();

 private:
  int ends_[2];
};

/// Forks as many ranks for each node, and returns what one of them answers. Throws Error(kSystem)
/// if one fails.
std::string on_nodes(const net::Namespaces& nodes, int ranks_per_node,
                     const std::function<void(std::shared_ptr<Bootstrap>, Answer&)>& body);

/// Why this machine cannot run perftest(), or make nodes; empty if it can.
std::string why_no_perftest();

/// Bytes a second of `ucx_perftest -t ucp_put_bw` from node 1 to node 0: puts of `bytes` bytes,
/// `total` in all.
double perftest(const net::Namespaces& nodes, std::int64_t bytes, std::int64_t total);

}  // namespace deep_ep::bench
