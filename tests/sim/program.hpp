#pragma once

#include <cstdint>
#include <vector>

#include "deep_ep/buffer.hpp"
#include "plan/reference.hpp"

namespace deep_ep::sim {

/// One dispatch and the calls that use its handle, as all ranks make them, with what must come out.
struct Round {
  std::vector<plan::reference::DispatchInput> inputs;     // [R]
  std::vector<plan::reference::DispatchOutput> received;  // [R]
  std::vector<plan::reference::CombineInput> outputs;     // [R]
  std::vector<plan::reference::CombineOutput> combined;   // [R]
  bool prepared = false;                                  // counts first, by a call of their own
  bool cached_too = false;                                // the dispatch again, with its handle
  int combines = 1;
};

/// A random sequence of dispatches and combines in bfloat16 whose sums are exact.
struct Program {
  int num_ranks;
  int ranks_per_node = 0;  // 0: all of one node
  int num_experts;
  int num_topk;
  std::int64_t hidden;
  Config config;
  std::vector<Round> rounds;

  explicit Program(std::uint64_t seed, bool several_nodes = false);

  /// Plays one rank; returns how many results differ from the reference, of all elements.
  std::int64_t play(Buffer& buffer) const;

 private:
  std::int64_t play(Buffer& buffer, const Round& round) const;
  std::int64_t dispatch(Buffer& buffer, const Round& round, DispatchResult& handle) const;
  std::int64_t dispatch_again(Buffer& buffer, const Round& round,
                              const DispatchResult& handle) const;
  std::int64_t combine(Buffer& buffer, const Round& round, const DispatchResult& handle) const;
};

}  // namespace deep_ep::sim
