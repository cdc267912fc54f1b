#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "identity.hpp"

// Layout, dispatch without counts, combine, cached dispatch and combine, and, within one node, a
// combine of grouped rows in one CUDA graph, replayed over routing and rows that change; then once
// without one of the ranks. Within one node also graphs of a single call.
namespace deep_ep::test {
namespace {

using cuda::check;
using std::chrono_literals::operator""s;

constexpr Shape kShape{};

class Replay {
 public:
  Replay(Buffer& buffer, cudaStream_t stream)
      : buffer_(buffer),
        stream_(stream),
        x_(Tensor::empty(DType::kFloat32, {kShape.tokens, kShape.hidden}, buffer.device())),
        ids_(Tensor::empty(DType::kInt64, {kShape.tokens, kShape.topk}, buffer.device())),
        weights_(Tensor::empty(DType::kFloat32, {kShape.tokens, kShape.topk}, buffer.device())) {
    (void)load(0);
    graph_ = capture(stream_, [this] { calls(); });
  }
  ~Replay() { (void)cudaGraphExecDestroy(graph_); }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  /// What is wrong with round `number`, or "".
  std::string run(int number) {
    const Round round = load(number);
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    for (const CombineResult& result : results_) {
      const Tensor here = result.combined_x.to({}, {stream_});
      buffer_.check();
      const std::string wrong =
          round.check_sums(kShape, here.as<float>(), fmt::format("round {}", number).c_str());
      if (!wrong.empty()) return wrong;
    }
    return "";
  }

  /// A replay that another rank has no part in: ends, gives NaN and not what the memory held, and
  /// the Error is seen.
  std::string run_alone() {
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    for (const CombineResult& result : results_) {
      const Tensor here = result.combined_x.to({}, {stream_});
      for (std::int64_t i = 0; i < here.numel(); ++i) {
        if (!std::isnan(here.as<float>()[i]))
          return fmt::format("alone: combined_x holds {} at {}", here.as<float>()[i], i);
      }
    }
    try {
      buffer_.check();
    } catch (const Error& error) {
      return error.code() == ErrorCode::kPeerFailed ? "" : error.what();
    }
    return "alone: no Error";
  }

 private:
  Round load(int number) {
    Round round(kShape, number, buffer_.rank(), buffer_.num_ranks());
    copy_in(x_, round.x.data(), stream_);
    copy_in(ids_, round.ids.data(), stream_);
    copy_in(weights_, round.weights.data(), stream_);
    return round;
  }

  void calls() {
    const CallOptions options{.stream = {stream_}};
    DispatchArgs args;
    args.x = x_;
    args.topk_idx = ids_;
    args.layout = buffer_.get_dispatch_layout(ids_, 2 * buffer_.num_ranks(), options);
    args.num_worst_tokens = kShape.tokens * buffer_.num_ranks();
    args.topk_weights = weights_;
    args.group_rows = buffer_.num_nodes() == 1;
    args.expert_alignment = 16;
    args.options = options;
    const DispatchResult got = buffer_.dispatch(args);
    CombineArgs back;
    back.x = got.recv_x;
    back.handle = got.handle;
    back.internode_handle = got.internode_handle;
    back.options = options;
    results_ = {buffer_.combine(back)};
    DispatchArgs again;
    again.x = x_;
    if (buffer_.num_nodes() == 1) {
      again.handle = got.handle;
    } else {
      again.internode_handle = got.internode_handle;
    }
    again.options = options;
    const DispatchResult cached = buffer_.dispatch(again);
    back.x = cached.recv_x;
    results_.push_back(buffer_.combine(back));
    if (!args.group_rows) return;
    back.x = got.grouped_x;
    back.groups = got.groups;
    results_.push_back(buffer_.combine(back));
  }

  Buffer& buffer_;
  cudaStream_t stream_;
  Tensor x_, ids_, weights_;
  std::vector<CombineResult> results_{};
  cudaGraphExec_t graph_ = nullptr;
};

/// Graphs of a single call that takes memory for itself: what later calls return must lie
/// elsewhere.
class FirstCalls {
 public:
  FirstCalls(Buffer& buffer, cudaStream_t stream)
      : buffer_(buffer), stream_(stream), round_(kShape, 0, buffer.rank(), buffer.num_ranks()) {}

  /// What is wrong, or "".
  std::string run() {
    const DispatchResult got = dispatch(round_);
    CombineArgs back;
    back.x = got.grouped_x;
    back.handle = got.handle;
    back.groups = got.groups;
    back.options = options();
    Tensor sums;
    const cudaGraphExec_t combine =
        capture(stream_, [&] { sums = buffer_.combine(back).combined_x; });
    std::string wrong = replay_over_results(combine);
    if (wrong.empty()) {
      const Tensor here = sums.to({}, {stream_});
      wrong = round_.check_sums(kShape, here.as<float>(), "combine of groups as a graph's first");
    }
    if (!wrong.empty()) return wrong;

    const Tensor x = upload(DType::kFloat32, {kShape.tokens, kShape.hidden}, round_.x.data());
    const Tensor recv_x =
        Tensor::empty(DType::kFloat32, {got.recv_x.shape[0], kShape.hidden}, buffer_.device());
    DispatchArgs again;
    again.x = x;
    again.handle = got.handle;
    again.recv_x = recv_x;
    again.options = options();
    const cudaGraphExec_t cached = capture(stream_, [&] { (void)buffer_.dispatch(again); });
    check(cudaMemsetAsync(recv_x.data, 0xff, recv_x.nbytes(), stream_), "cudaMemsetAsync");
    wrong = replay_over_results(cached);
    if (!wrong.empty()) return wrong;
    return is_same(recv_x, got.recv_x.to({}, {stream_}))
               ? ""
               : "a cached dispatch as a graph's first call: recv_x is not that of the first";
  }

 private:
  CallOptions options() const { return {.stream = {stream_}}; }
  Tensor upload(DType dtype, std::initializer_list<std::int64_t> shape, const void* from) {
    const Tensor to = Tensor::empty(dtype, shape, buffer_.device());
    copy_in(to, from, stream_);
    return to;
  }
  DispatchResult dispatch(const Round& round) {
    const Tensor x = upload(DType::kFloat32, {kShape.tokens, kShape.hidden}, round.x.data());
    const Tensor ids = upload(DType::kInt64, {kShape.tokens, kShape.topk}, round.ids.data());
    const Tensor weights =
        upload(DType::kFloat32, {kShape.tokens, kShape.topk}, round.weights.data());
    DispatchArgs args;
    args.x = x;
    args.topk_idx = ids;
    args.topk_weights = weights;
    args.layout = buffer_.get_dispatch_layout(ids, 2 * buffer_.num_ranks(), options());
    args.group_rows = true;
    args.options = options();
    DispatchResult result = buffer_.dispatch(args);
    check(cudaStreamSynchronize(stream_), "a dispatch");
    return result;
  }
  bool is_same(const Tensor& there, const Tensor& want) {
    const Tensor here = there.to({}, {stream_});
    return std::memcmp(here.data, want.data, want.nbytes()) == 0;
  }
  /// Takes the graph's place in memory, if somebody can, and replays it.
  std::string replay_over_results(cudaGraphExec_t graph) {
    constexpr int kResults = 6;
    std::vector<DispatchResult> live;
    std::vector<Tensor> copies;
    std::vector<Tensor> heads;
    for (int i = 1; i <= kResults; ++i) {
      live.push_back(dispatch(Round(kShape, i, buffer_.rank(), buffer_.num_ranks())));
      copies.push_back(live.back().recv_x.to({}, {stream_}));
      heads.push_back(live.back().handle.send_head.to({}, {stream_}));
    }
    check(cudaGraphLaunch(graph, stream_), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream_), "a replay");
    (void)cudaGraphExecDestroy(graph);
    buffer_.check();
    for (int i = 0; i < kResults; ++i) {
      if (!is_same(live[i].recv_x, copies[i]) || !is_same(live[i].handle.send_head, heads[i]))
        return fmt::format("a replay wrote to a result of dispatch {}", i);
    }
    return "";
  }

  Buffer& buffer_;
  cudaStream_t stream_;
  const Round round_;
};

/// Tokens of `rank` in round `number` that go to a rank of `node`.
std::int64_t tokens_for(const Buffer& buffer, int number, int rank, int node) {
  const Round round(kShape, number, rank, buffer.num_ranks());
  const int experts = 2 * buffer.num_ranks_per_node();
  std::int64_t tokens = 0;
  for (auto ids = round.ids.begin(); ids != round.ids.end(); ids += kShape.topk) {
    tokens += std::any_of(ids, ids + kShape.topk,
                          [&](std::int64_t id) { return id >= 0 && id / experts == node; });
  }
  return tokens;
}

/// What is wrong with the counts of a round, in which all tokens go to other nodes and come home
/// twice, or "".
std::string check_counts(const Buffer& buffer, int number, const NetworkCounts& before) {
  const NetworkCounts after = buffer.network_counts();
  const int ranks_per_node = buffer.num_ranks_per_node();
  const int own = buffer.rank() / ranks_per_node;
  std::int64_t rows = 0;
  for (int node = 0; node < buffer.num_nodes(); ++node) {
    if (node == own) continue;
    const int peer = node * ranks_per_node + buffer.rank() % ranks_per_node;
    rows += 2 * (tokens_for(buffer, number, buffer.rank(), node) +
                 tokens_for(buffer, number, peer, own));
  }
  if (after.rows - before.rows != rows)
    return fmt::format("round {}: {} rows crossed, not {}", number, after.rows - before.rows, rows);
  const std::int64_t bytes = after.row_bytes - before.row_bytes;
  const std::int64_t announced = buffer.num_nodes() - 1;
  if (bytes < rows * kShape.hidden * 4 || after.put_bytes - before.put_bytes < bytes ||
      after.puts - before.puts < rows + 4 * announced ||
      after.signals - before.signals < 2 * rows + 4 * announced) {
    return fmt::format("round {}: {} rows are {} bytes, {} puts of {} bytes and {} signals", number,
                       rows, bytes, after.puts - before.puts, after.put_bytes - before.put_bytes,
                       after.signals - before.signals);
  }
  return "";
}

std::string play(Worker& worker, const std::string& job) {
  const Device device = device_of(worker);
  cudaStream_t stream = make_stream();
  std::unique_ptr<Buffer> made;
  try {
    made = std::make_unique<Buffer>(worker.bootstrap(),
                                    BufferOptions{.device = device, .timeout = 20s});
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kUnsupported) return kSkip + std::string(error.what());
    throw;
  }
  Buffer& buffer = *made;
  if (buffer.num_nodes() == 1) {
    // Ahead of any other capture, in which the communication stream would have a part already.
    const std::string wrong = FirstCalls(buffer, stream).run();
    if (!wrong.empty()) return wrong;
  }
  Replay replay(buffer, stream);
  for (int round = 1; round <= std::stoi(job); ++round) {
    const NetworkCounts before = buffer.network_counts();
    std::string wrong = replay.run(round);
    if (wrong.empty() && buffer.num_nodes() > 1) wrong = check_counts(buffer, round, before);
    if (!wrong.empty()) return wrong;
  }
  // The last rank leaves, when all have checked what it had a part in.
  worker.bootstrap()->barrier();
  if (worker.rank() + 1 == worker.num_ranks()) return "";
  return replay.run_alone();
}

}  // namespace
}  // namespace deep_ep::test

/// Arguments: rounds, and anything, to leave out what is of one node.
int main(int argc, char** argv) {
  const std::string rounds = argc > 1 ? argv[1] : "200";
  deep_ep::test::GroupRunner runner(deep_ep::test::play);
  if (argc <= 2) runner.run_on_ranks(4, rounds);
  runner.run_on_nodes(2, 1, rounds);
  runner.run_on_nodes(2, 2, rounds);
  return runner.finish();
}
