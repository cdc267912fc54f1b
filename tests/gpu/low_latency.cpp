#include <cstring>
#include <memory>

#include "differences.hpp"
#include "identity.hpp"

// Low-latency dispatch and combine in CUDA graphs, replayed over routing and rows that change:
// small and large batches, both formats, with hooks. The experts change nothing and all weights are
// 1, so a token's result is its row times its entries. Some rounds the host makes anew and looks
// at; many more lie on the GPU, which compares results too, so that replays follow each other
// closely.
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
// Replays that follow each other closely, of ranks with a GPU each, and of ranks that share GPUs.
constexpr std::int64_t kMany = 100'000;
constexpr std::int64_t kManyShared = 1'000;
constexpr int kLookEvery = 500;
// Not a divisor of what else alternates, so that rounds meet all parities.
constexpr int kKeptRounds = 7;

std::uint16_t bfloat16(int value) {
  const auto number = static_cast<float>(value);
  std::uint32_t bits = 0;
  std::memcpy(&bits, &number, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}

/// What a rank gives to a replay, and what has to come home.
struct Inputs {
  std::vector<std::uint16_t> x{};
  std::vector<std::int64_t> ids{};
  std::vector<std::uint16_t> want{};

  Inputs(const Kind& kind, int number, int rank, int ranks) {
    const bool rank_major = kind.format == LowLatencyFormat::kRankMajor;
    std::uint64_t seed =
        static_cast<std::uint64_t>(number) * 131 + static_cast<std::uint64_t>(rank) * 1009;
    for (std::int64_t token = 0; token < kind.tokens; ++token) {
      int entries = 0;
      std::vector<bool> goes(static_cast<std::size_t>(ranks), false);
      for (int k = 0; k < kind.topk; ++k) {
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
      for (std::int64_t i = 0; i < kind.hidden; ++i) {
        const auto value = static_cast<int>(1 + (number * 7 + rank * 11 + token * 3 + i) % 31);
        x.push_back(bfloat16(value));
        want.push_back(bfloat16(value * (rank_major ? copies : entries)));
      }
    }
  }
};

class Replay {
 public:
  Replay(Buffer& buffer, cudaStream_t stream, const Kind& kind)
      : buffer_(buffer),
        stream_(stream),
        kind_(kind),
        x_(Tensor::empty(DType::kBfloat16, {kind.tokens, kind.hidden}, buffer.device())),
        ids_(Tensor::empty(DType::kInt64, {kind.tokens, kind.topk}, buffer.device())),
        weights_(Tensor::empty(DType::kFloat32, {kind.tokens, kind.topk}, buffer.device())) {
    const std::vector<float> ones(static_cast<std::size_t>(weights_.numel()), 1.0F);
    copy_in(weights_, ones.data(), stream_);
    load(inputs(0));
    graph_ = capture(stream_, [this] { calls(); });
  }
  ~Replay() { (void)cudaGraphExecDestroy(graph_); }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  /// What is wrong with round `number`, or "".
  std::string run(int number) {
    const Inputs round = inputs(number);
    load(round);
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    const Tensor here = result_.combined_x.to({}, {stream_});
    buffer_.check();
    for (std::int64_t i = 0; i < here.numel(); ++i) {
      const std::uint16_t want = round.want[static_cast<std::size_t>(i)];
      const std::uint16_t got = here.as<std::uint16_t>()[i];
      if (got != want)
        return fmt::format("round {}: combined_x[{}, {}] is {:#x}, not {:#x}", number,
                           i / kind_.hidden, i % kind_.hidden, got, want);
    }
    return "";
  }

  /// Puts rounds into GPU memory, for `queue`.
  void keep_rounds(int number) {
    for (int i = 0; i < number; ++i) {
      const Inputs round = inputs(i + 1);
      Kept kept{like(x_), like(ids_), like(x_)};
      copy_in(kept.x, round.x.data(), stream_);
      copy_in(kept.ids, round.ids.data(), stream_);
      copy_in(kept.want, round.want.data(), stream_);
      kept_.push_back(kept);
    }
  }
  /// A replay of a kept round; words that are wrong are added to `*wrong`.
  void queue(std::int64_t round, unsigned long long* wrong) {
    const Kept& kept = kept_[static_cast<std::size_t>(round) % kept_.size()];
    copy(x_, kept.x);
    copy(ids_, kept.ids);
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    check(gpu_test::count_differences(stream_, result_.combined_x.data, kept.want.data,
                                      kept.want.nbytes(), wrong),
          "count_differences");
  }

 private:
  struct Kept {
    Tensor x, ids, want;
  };

  Inputs inputs(int number) const { return {kind_, number, buffer_.rank(), buffer_.num_ranks()}; }
  Tensor like(const Tensor& one) const {
    return Tensor::empty(one.dtype, {one.shape[0], one.shape[1]}, buffer_.device());
  }
  void copy(const Tensor& to, const Tensor& from) const {
    check(cudaMemcpyAsync(to.data, from.data, to.nbytes(), cudaMemcpyDeviceToDevice, stream_),
          "cudaMemcpyAsync");
  }
  void load(const Inputs& round) {
    copy_in(x_, round.x.data(), stream_);
    copy_in(ids_, round.ids.data(), stream_);
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
  std::vector<Kept> kept_{};
  cudaGraphExec_t graph_ = nullptr;
};

/// `number` replays of all kinds in turn. What is wrong, or "".
std::string run_many(Buffer& buffer, const std::vector<std::unique_ptr<Replay>>& replays,
                     cudaStream_t stream, std::int64_t number) {
  for (const auto& replay : replays) replay->keep_rounds(kKeptRounds);
  const Tensor wrong = Tensor::empty(DType::kInt64, {1}, buffer.device());
  const std::int64_t none = 0;
  copy_in(wrong, &none, stream);
  for (std::int64_t i = 0; i < number; ++i) {
    replays[static_cast<std::size_t>(i) % replays.size()]->queue(
        i / static_cast<std::int64_t>(replays.size()),
        static_cast<unsigned long long*>(wrong.data));
    if ((i + 1) % kLookEvery != 0 && i + 1 < number) continue;
    const Tensor here = wrong.to({}, {stream});
    buffer.check();
    if (*here.as<std::int64_t>() != 0)
      return fmt::format("{} words of 16 bytes are wrong after {} replays",
                         *here.as<std::int64_t>(), i + 1);
  }
  return "";
}

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
  return run_many(buffer, replays, stream, shares_gpu(worker) ? kManyShared : kMany);
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
