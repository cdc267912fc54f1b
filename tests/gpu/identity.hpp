#pragma once

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cuda/check.hpp"
#include "contract/pool.hpp"
#include "deep_ep/deep_ep.hpp"

// Layers whose experts change nothing: a token's sum is its row times the ranks that it goes to.
// What a round holds follows from its number, so that nothing has to be kept to check it.
namespace deep_ep::test {

struct Shape {
  std::int64_t tokens = 97;
  std::int64_t hidden = 256;
  int topk = 3;
};

/// Inputs of a round of one rank; two experts a rank.
struct Round {
  std::vector<float> x{};
  std::vector<std::int64_t> ids{};
  std::vector<float> weights{};  // of each token and rank one is 1, the others are 0
  std::vector<int> copies{};     // of each token: ranks that it goes to

  Round(const Shape& shape, int number, int rank, int ranks) {
    for (std::int64_t token = 0; token < shape.tokens; ++token) {
      std::uint64_t seed =
          (static_cast<std::uint64_t>(number) * 131 + static_cast<std::uint64_t>(rank)) * 1009 +
          static_cast<std::uint64_t>(token);
      std::vector<bool> goes(static_cast<std::size_t>(ranks), false);
      for (int k = 0; k < shape.topk; ++k) {
        seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
        const auto expert =
            static_cast<std::int64_t>((seed >> 33) % static_cast<std::uint64_t>(2 * ranks + 1)) - 1;
        ids.push_back(expert);
        const bool first = expert >= 0 && !goes[static_cast<std::size_t>(expert / 2)];
        weights.push_back(first ? 1.0F : 0.0F);
        if (first) goes[static_cast<std::size_t>(expert / 2)] = true;
      }
      copies.push_back(static_cast<int>(std::count(goes.begin(), goes.end(), true)));
      for (std::int64_t i = 0; i < shape.hidden; ++i) x.push_back(value(number, rank, token, i));
    }
  }
  static float value(int number, int rank, std::int64_t token, std::int64_t i) {
    return static_cast<float>(1 + (number * 7 + rank * 31 + token * 3 + i) % 500);
  }

  /// What is wrong with the sums, or "".
  std::string check_sums(const Shape& shape, const float* sums, const char* what) const {
    for (std::int64_t i = 0; i < shape.tokens * shape.hidden; ++i) {
      const float want = static_cast<float>(copies[static_cast<std::size_t>(i / shape.hidden)]) *
                         x[static_cast<std::size_t>(i)];
      if (sums[i] != want)
        return fmt::format("{}: combined_x[{}, {}] is {}, not {}", what, i / shape.hidden,
                           i % shape.hidden, sums[i], want);
    }
    return "";
  }
};

constexpr const char* kSkip = "skip: ";

/// Runs `play` on groups of ranks, counting how they end.
class GroupRunner {
 public:
  explicit GroupRunner(Pool::Work play)
      : play_([play = std::move(play)](Worker& worker, const std::string& text) -> std::string {
          if (num_devices(DeviceType::kCuda) == 0) return std::string(kSkip) + "no GPU";
          return play(worker, text);
        }) {}

  /// Ranks of one node, 1 to most_ranks of them.
  void run_on_ranks(int most_ranks, const std::string& job) {
    Pool pool(most_ranks, play_);
    for (int ranks = 1; ranks <= most_ranks; ++ranks)
      count(pool.run(ranks, job, kLimit), fmt::format("{} ranks", ranks));
  }
  /// Ranks that pose as several nodes, in processes of their own.
  void run_on_nodes(int nodes, int ranks_per_node, const std::string& job) {
    setenv("DEEP_EP_RANKS_PER_NODE", std::to_string(ranks_per_node).c_str(), 1);
    {
      Pool pool(nodes * ranks_per_node, play_);
      count(pool.run(nodes * ranks_per_node, job, kLimit),
            fmt::format("{} nodes of {} ranks", nodes, ranks_per_node));
    }
    unsetenv("DEEP_EP_RANKS_PER_NODE");
  }
  /// Prints "N passed, N failed, N skipped". Exit status.
  int finish() const {
    fmt::print("{} passed, {} failed, {} skipped\n", passed_, failed_, skipped_);
    return failed_ != 0 ? 1 : passed_ == 0 ? 77 : 0;
  }

 private:
  static constexpr std::chrono::seconds kLimit{400};

  void count(const std::vector<Outcome>& outcomes, const std::string& where) {
    std::string wrong;
    bool skip = false;
    for (const Outcome& outcome : outcomes) {
      skip = skip || outcome.answer.starts_with(kSkip);
      if (skip || (outcome.answered && outcome.answer.empty())) continue;
      wrong += "\n  " + (outcome.timed_out ? "hangs" : outcome.answer + outcome.failure);
    }
    if (!wrong.empty()) fmt::print("FAILED {}{}\n", where, wrong);
    ++(skip ? skipped_ : wrong.empty() ? passed_ : failed_);
    std::fflush(stdout);
  }

  Pool::Work play_;
  int passed_ = 0;
  int failed_ = 0;
  int skipped_ = 0;
};

/// Runs `play` on 1 to most_ranks ranks; prints "N passed, N failed, N skipped". Exit status.
inline int run_on_ranks(int most_ranks, const Pool::Work& play, const std::string& job) {
  GroupRunner runner(play);
  runner.run_on_ranks(most_ranks, job);
  return runner.finish();
}

/// The GPU of a rank, made current; ranks share GPUs when there are fewer.
inline Device device_of(const Worker& worker) {
  const Device device{DeviceType::kCuda, worker.rank() % num_devices(DeviceType::kCuda)};
  cuda::check(cudaSetDevice(device.index), "cudaSetDevice");
  return device;
}

/// Ranks that share a GPU wait for each other's turns on it, so that they get less done.
inline bool shares_gpu(const Worker& worker) {
  return worker.num_ranks() > num_devices(DeviceType::kCuda);
}

inline cudaStream_t make_stream() {
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}

/// Nothing starts later than behind the one before: each node of a graph of calls from one stream
/// depends on one.
inline void require_chain(cudaGraph_t graph) {
  std::size_t nodes = 0, edges = 0;
  cuda::check(cudaGraphGetNodes(graph, nullptr, &nodes), "cudaGraphGetNodes");
  cuda::check(cudaGraphGetEdges(graph, nullptr, nullptr, nullptr, &edges), "cudaGraphGetEdges");
  if (edges + 1 == nodes) return;
  throw std::runtime_error(
      fmt::format("a graph has {} nodes and {} edges: no chain", nodes, edges));
}

/// What `calls` queue on the stream, as a graph. They run once before, since what is allocated at
/// the first time is not part of it.
template <class Calls>
cudaGraphExec_t capture(cudaStream_t stream, Calls&& calls) {
  calls();
  cuda::check(cudaStreamSynchronize(stream), "warm-up");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin of the capture");
  calls();
  cuda::check(cudaStreamEndCapture(stream, &graph), "end of the capture");
  require_chain(graph);
  cuda::check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  (void)cudaGraphDestroy(graph);
  return executable;
}

inline void copy_in(const Tensor& to, const void* from, cudaStream_t stream) {
  cuda::check(cudaMemcpyAsync(to.data, from, to.nbytes(), cudaMemcpyHostToDevice, stream),
              "cudaMemcpyAsync");
  cuda::check(cudaStreamSynchronize(stream), "cudaMemcpyAsync");
}

}  // namespace deep_ep::test
