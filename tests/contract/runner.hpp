#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "contract/keepsake.hpp"
#include "contract/pool.hpp"
#include "contract/program.hpp"

namespace deep_ep::test {

/// What the suite runs on.
struct Target {
  Device device{};
  std::chrono::milliseconds timeout{20'000};  ///< of each Buffer
  /// Moves the calling thread to a node. Empty: ranks of this machine pose as nodes.
  std::function<void(int node)> enter_node{};
};

/// A rank's side of the suite: its Buffers live from program to program.
class Runner {
 public:
  /// What `run` answers besides a text about what is wrong.
  static constexpr const char* kPassed = "passed";
  static constexpr const char* kSkipped = "skipped: ";

  explicit Runner(const Target& target) : target_(target) {}

  /// Collective. All Buffers of the rank go first if `generation` is a new one: then some rank's
  /// are broken or gone.
  std::string run(Worker& worker, const Program& program, std::int64_t generation);

 private:
  /// Ranks, ranks of a node, and the program's number of the Buffer.
  struct Made {
    std::unique_ptr<Buffer> buffer;
    std::int64_t rdma_bytes = 0;
  };
  using Buffers = std::map<std::tuple<int, int, int>, Made>;

  Buffer& buffer(Worker& worker, Buffers& buffers, const Program& program, int number);
  std::string run_steps(Worker& worker, const Program& program, Buffers& buffers);
  void enter_node(int node);
  void drop(Buffers& buffers, int num_ranks);

  Target target_;
  int node_ = -1;  // that this rank's process lives on
  std::int64_t generation_ = -1;
  Buffers buffers_;
  std::map<int, int> programs_since_renewal_;  // by number of ranks
  Keepsakes keepsakes_;
};

}  // namespace deep_ep::test
