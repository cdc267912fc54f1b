#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "backend/cuda/check.hpp"
#include "contract/pool.hpp"
#include "deep_ep/deep_ep.hpp"

// Layout, dispatch without counts, combine, cached dispatch and combine in one CUDA graph, replayed
// over routing and rows that change. Prints "N passed, N failed, N skipped".
namespace deep_ep::test {
namespace {

using cuda::check;
using std::chrono_literals::operator""s;

constexpr std::int64_t kTokens = 97;
constexpr std::int64_t kHidden = 256;
constexpr int kTopk = 3;
constexpr const char* kSkip = "skip: ";

/// Inputs of a round, by formula.
struct Round {
  std::vector<float> x;
  std::vector<std::int64_t> ids;
  std::vector<int> copies;  // of each token: ranks that it goes to

  Round(int number, int rank, int ranks) {
    for (std::int64_t token = 0; token < kTokens; ++token) {
      std::uint64_t seed =
          (static_cast<std::uint64_t>(number) * 131 + static_cast<std::uint64_t>(rank)) * 1009 +
          static_cast<std::uint64_t>(token);
      std::vector<bool> goes(static_cast<std::size_t>(ranks), false);
      for (int k = 0; k < kTopk; ++k) {
        seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
        const auto expert =
            static_cast<std::int64_t>((seed >> 33) % static_cast<std::uint64_t>(2 * ranks + 1)) - 1;
        ids.push_back(expert);
        if (expert >= 0) goes[static_cast<std::size_t>(expert / 2)] = true;
      }
      copies.push_back(static_cast<int>(std::count(goes.begin(), goes.end(), true)));
      for (std::int64_t i = 0; i < kHidden; ++i)
        x.push_back(static_cast<float>(1 + (number * 7 + rank * 31 + token * 3 + i) % 500));
    }
  }
};

class Replay {
 public:
  Replay(Buffer& buffer, cudaStream_t stream)
      : buffer_(buffer),
        stream_(stream),
        x_(Tensor::empty(DType::kFloat32, {kTokens, kHidden}, buffer.device())),
        ids_(Tensor::empty(DType::kInt64, {kTokens, kTopk}, buffer.device())) {
    load(0);
    calls();  // what is allocated at the first call is not part of the graph
    check(cudaStreamSynchronize(stream_), "warm-up");
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    calls();
    check(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&graph_, graph, 0), "cudaGraphInstantiate");
    (void)cudaGraphDestroy(graph);
  }
  ~Replay() { (void)cudaGraphExecDestroy(graph_); }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  /// What is wrong with round `number`, or "".
  std::string run(int number) {
    const Round round = load(number);
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    for (const Tensor* sums : {&first_.combined_x, &second_.combined_x}) {
      const Tensor here = sums->to({}, {stream_});
      buffer_.check();
      for (std::int64_t i = 0; i < kTokens * kHidden; ++i) {
        const float want = static_cast<float>(round.copies[static_cast<std::size_t>(i / kHidden)]) *
                           round.x[static_cast<std::size_t>(i)];
        if (here.as<float>()[i] != want)
          return fmt::format("round {}: combined_x[{}, {}] is {}, not {}", number, i / kHidden,
                             i % kHidden, here.as<float>()[i], want);
      }
    }
    return "";
  }

 private:
  Round load(int number) {
    Round round(number, buffer_.rank(), buffer_.num_ranks());
    check(cudaMemcpyAsync(x_.data, round.x.data(), x_.nbytes(), cudaMemcpyHostToDevice, stream_),
          "cudaMemcpyAsync");
    check(cudaMemcpyAsync(ids_.data, round.ids.data(), ids_.nbytes(), cudaMemcpyHostToDevice,
                          stream_),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "cudaMemcpyAsync");
    return round;
  }

  void calls() {
    const CallOptions options{.stream = {stream_}};
    DispatchArgs args;
    args.x = x_;
    args.topk_idx = ids_;
    args.layout = buffer_.get_dispatch_layout(ids_, 2 * buffer_.num_ranks(), options);
    args.num_worst_tokens = kTokens * buffer_.num_ranks();
    args.options = options;
    const DispatchResult got = buffer_.dispatch(args);
    CombineArgs back;
    back.x = got.recv_x;
    back.handle = got.handle;
    back.options = options;
    first_ = buffer_.combine(back);
    DispatchArgs again;
    again.x = x_;
    again.handle = got.handle;
    again.options = options;
    const DispatchResult cached = buffer_.dispatch(again);
    back.x = cached.recv_x;
    second_ = buffer_.combine(back);
  }

  Buffer& buffer_;
  cudaStream_t stream_;
  Tensor x_, ids_;
  CombineResult first_, second_;
  cudaGraphExec_t graph_ = nullptr;
};

std::string play(Worker& worker, const std::string& job) {
  const int gpus = num_devices(DeviceType::kCuda);
  if (gpus == 0) return std::string(kSkip) + "no GPU";
  const int device = worker.rank() % gpus;
  check(cudaSetDevice(device), "cudaSetDevice");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  Buffer buffer(worker.bootstrap(), {.device = {DeviceType::kCuda, device}, .timeout = 20s});
  Replay replay(buffer, stream);
  for (int round = 1; round <= std::stoi(job); ++round) {
    const std::string wrong = replay.run(round);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

int run(int rounds) {
  constexpr int kMostRanks = 4;
  Pool pool(kMostRanks, play);
  int passed = 0;
  int failed = 0;
  int skipped = 0;
  for (int ranks = 1; ranks <= kMostRanks; ++ranks) {
    std::string wrong;
    bool skip = false;
    for (const Outcome& outcome : pool.run(ranks, std::to_string(rounds), 300s)) {
      skip = skip || outcome.answer.starts_with(kSkip);
      if (skip || (outcome.answered && outcome.answer.empty())) continue;
      wrong += "\n  " + (outcome.timed_out ? "hangs" : outcome.answer + outcome.failure);
    }
    if (!wrong.empty()) fmt::print("FAILED {} ranks{}\n", ranks, wrong);
    ++(skip ? skipped : wrong.empty() ? passed : failed);
    std::fflush(stdout);
  }
  fmt::print("{} passed, {} failed, {} skipped\n", passed, failed, skipped);
  return failed != 0 ? 1 : passed == 0 ? 77 : 0;
}

}  // namespace
}  // namespace deep_ep::test

int main(int argc, char** argv) { return deep_ep::test::run(argc > 1 ? std::stoi(argv[1]) : 200); }
