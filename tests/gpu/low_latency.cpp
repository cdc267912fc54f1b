#include <cstring>
#include <memory>

#include "identity.hpp"

// Low-latency dispatch and combine in CUDA graphs, replayed over routing and rows that change:
// small and large batches, both formats, with hooks. The experts change nothing and all weights are
// 1, so a token's result is its row times its entries.
namespace deep_ep::test {
namespace {

using cuda::check;
using std::chrono_literals::operator""s;

struct Kind {
  std::int64_t tokens;
  std::int64_t max_tokens;
  std::int64_t hidden;
  int topk;
  LowLatencyFormat format;
  bool hook;
};

constexpr Kind kKinds[] = {
    {5, 8, 256, 3, LowLatencyFormat::kExpertMajor, false},
    {1, 128, 7168, 8, LowLatencyFormat::kExpertMajor, false},
    {61, 64, 2048, 4, LowLatencyFormat::kExpertMajor, true},
    {128, 128, 7168, 8, LowLatencyFormat::kExpertMajor, false},
    {7, 16, 512, 6, LowLatencyFormat::kRankMajor, false},
    {100, 128, 5120, 8, LowLatencyFormat::kRankMajor, true},
};
constexpr int kExpertsARank = 4;

std::uint16_t bfloat16(int value) {
  const auto number = static_cast<float>(value);
  std::uint32_t bits = 0;
  std::memcpy(&bits, &number, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}

class Replay {
 public:
  Replay(Buffer& buffer, cudaStream_t stream, const Kind& kind)
      : buffer_(buffer),
        stream_(stream),
        kind_(kind),
        x_(Tensor::empty(DType::kBfloat16, {kind.tokens, kind.hidden}, buffer.device())),
        ids_(Tensor::empty(DType::kInt64, {kind.tokens, kind.topk}, buffer.device())),
        weights_(Tensor::empty(DType::kFloat32, {kind.tokens, kind.topk}, buffer.device())) {
    load(0);
    graph_ = capture(stream_, [this] { calls(); });
  }
  ~Replay() { (void)cudaGraphExecDestroy(graph_); }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  /// What is wrong with round `number`, or "".
  std::string run(int number) {
    load(number);
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    const Tensor here = result_.combined_x.to({}, {stream_});
    buffer_.check();
    for (std::int64_t i = 0; i < here.numel(); ++i) {
      const std::uint16_t want = want_[static_cast<std::size_t>(i)];
      const std::uint16_t got = here.as<std::uint16_t>()[i];
      if (got != want)
        return fmt::format("round {}: combined_x[{}, {}] is {:#x}, not {:#x}", number,
                           i / kind_.hidden, i % kind_.hidden, got, want);
    }
    return "";
  }

 private:
  void load(int number) {
    const int ranks = buffer_.num_ranks();
    const bool rank_major = kind_.format == LowLatencyFormat::kRankMajor;
    std::vector<std::uint16_t> x;
    std::vector<std::int64_t> ids;
    std::vector<float> weights(static_cast<std::size_t>(kind_.tokens * kind_.topk), 1.0f);
    want_.clear();
    std::uint64_t seed = static_cast<std::uint64_t>(number) * 131 +
                         static_cast<std::uint64_t>(buffer_.rank()) * 1009;
    for (std::int64_t token = 0; token < kind_.tokens; ++token) {
      int entries = 0;
      std::vector<bool> goes(static_cast<std::size_t>(ranks), false);
      for (int k = 0; k < kind_.topk; ++k) {
        seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
        const auto choices = static_cast<std::uint64_t>(kExpertsARank * ranks + 1);  // and none
        const auto expert = static_cast<std::int64_t>((seed >> 33) % choices) - 1;
        ids.push_back(expert);
        if (expert < 0) continue;
        ++entries;
        goes[static_cast<std::size_t>(expert / kExpertsARank)] = true;
      }
      // Rank-major rows come home as they are.
      const auto copies = static_cast<int>(std::count(goes.begin(), goes.end(), true));
      for (std::int64_t i = 0; i < kind_.hidden; ++i) {
        const auto value =
            static_cast<int>(1 + (number * 7 + buffer_.rank() * 11 + token * 3 + i) % 31);
        x.push_back(bfloat16(value));
        want_.push_back(bfloat16(value * (rank_major ? copies : entries)));
      }
    }
    copy_in(x_, x.data(), stream_);
    copy_in(ids_, ids.data(), stream_);
    copy_in(weights_, weights.data(), stream_);
  }

  void calls() {
    LowLatencyDispatchArgs args;
    args.x = x_;
    args.topk_idx = ids_;
    args.num_max_dispatch_tokens_per_rank = static_cast<int>(kind_.max_tokens);
    args.num_experts = kExpertsARank * buffer_.num_ranks();
    args.use_fp8 = false;
    args.format = kind_.format;
    args.options.stream = {stream_};
    args.return_recv_hook = kind_.hook;
    const LowLatencyDispatchResult got = buffer_.low_latency_dispatch(args);
    if (kind_.hook) got.recv_hook();
    LowLatencyCombineArgs back;
    back.x = got.recv_x;
    back.topk_idx = ids_;
    back.topk_weights = weights_;
    back.handle = got.handle;
    back.options = args.options;
    back.return_recv_hook = kind_.hook;
    result_ = buffer_.low_latency_combine(back);
    if (kind_.hook) result_.recv_hook();
  }

  Buffer& buffer_;
  cudaStream_t stream_;
  Kind kind_;
  Tensor x_, ids_, weights_;
  LowLatencyCombineResult result_{};
  std::vector<std::uint16_t> want_{};
  cudaGraphExec_t graph_ = nullptr;
};

std::string play(Worker& worker, const std::string& job) {
  const Device device = device_of(worker);
  cudaStream_t stream = make_stream();
  const int ranks = worker.num_ranks();
  BufferOptions options{.device = device, .timeout = 20s};
  options.num_rdma_bytes =
      Buffer::get_low_latency_rdma_size_hint(128, 7168, ranks, kExpertsARank * ranks, 8);
  options.low_latency_mode = true;
  std::unique_ptr<Buffer> made;
  try {
    made = std::make_unique<Buffer>(worker.bootstrap(), options);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kUnsupported) return kSkip + std::string(error.what());
    throw;
  }
  Buffer& buffer = *made;
  // One graph each, on one Buffer: replays of different shapes take turns.
  std::vector<std::unique_ptr<Replay>> replays;
  for (const Kind& kind : kKinds) replays.push_back(std::make_unique<Replay>(buffer, stream, kind));
  for (int round = 1; round <= std::stoi(job); ++round) {
    for (std::size_t i = 0; i < replays.size(); ++i) {
      const std::string wrong = replays[i]->run(round);
      if (!wrong.empty()) return fmt::format("kind {}: {}", i, wrong);
    }
  }
  return "";
}

}  // namespace
}  // namespace deep_ep::test

/// Arguments: rounds, and ranks of each of two nodes, to leave out all others.
int main(int argc, char** argv) {
  const std::string rounds = argc > 1 ? argv[1] : "50";
  deep_ep::test::GroupRunner runner(deep_ep::test::play);
  if (argc <= 2) runner.run_on_ranks(4, rounds);
  for (const int ranks_per_node : {1, 2}) {
    if (argc <= 2 || ranks_per_node == std::stoi(argv[2]))
      runner.run_on_nodes(2, ranks_per_node, rounds);
  }
  return runner.finish();
}
