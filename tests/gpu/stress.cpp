#include "identity.hpp"

// Many calls one behind the other without a look at any in between, shapes alternating, results
// dropped while another stream still reads them: a block that was used again too early would show
// in what that stream read.
namespace deep_ep::test {
namespace {

using cuda::check;
using std::chrono_literals::operator""s;

// The large ones fill what a Buffer begins with after a few calls, so that blocks are used again
// soon.
constexpr Shape kShapes[] = {{200, 4096, 3}, {97, 256, 3}, {1, 64, 1}, {400, 2048, 4}};
constexpr int kNumShapes = static_cast<int>(std::size(kShapes));
constexpr int kLooks = 100;
// Ranks with a GPU each make as many calls at least.
constexpr int kMany = 100'000;
// Rows of a layer differ from call to call, so that a block that was used again shows.
constexpr int kVariants = 7;

/// One shape's inputs, and its handle.
struct Layer {
  Layer(Buffer& buffer, const Shape& given, int given_number, cudaStream_t stream)
      : shape(given), number(given_number) {
    for (int v = 0; v < kVariants; ++v) {
      // The routing of the first, the rows of another round.
      rounds.emplace_back(given, number + v * kNumShapes, buffer.rank(), buffer.num_ranks());
      rounds.back().copies = rounds.front().copies;
      xs.push_back(Tensor::empty(DType::kFloat32, {given.tokens, given.hidden}, buffer.device()));
      copy_in(xs.back(), rounds.back().x.data(), stream);
    }
    const Tensor ids = Tensor::empty(DType::kInt64, {given.tokens, given.topk}, buffer.device());
    copy_in(ids, rounds.front().ids.data(), stream);
    DispatchArgs args;
    args.options.stream = {stream};
    args.x = xs.front();
    args.topk_idx = ids;
    args.layout = buffer.get_dispatch_layout(ids, 2 * buffer.num_ranks(), args.options);
    const DispatchResult first = buffer.dispatch(args);
    handle = first.handle;
    copy = Tensor::empty(DType::kFloat32,
                         {std::max<std::int64_t>(1, first.num_recv_tokens), given.hidden},
                         buffer.device());
    check(cudaStreamSynchronize(stream), "first dispatch");
  }

  Shape shape;
  int number;
  int last = 0;  // variant of the last call
  int read = 0;  // variant that the copy is of
  std::vector<Round> rounds{};
  std::vector<Tensor> xs{};
  Tensor copy{};  // what the other stream read of recv_x
  IntranodeHandle handle{};
};

class Stress {
 public:
  explicit Stress(Worker& worker, const Device& device)
      : stream_(make_stream()),
        reader_(make_stream()),
        buffer_(worker.bootstrap(), {.device = device, .timeout = 20s}),
        ballast_(Tensor::empty(DType::kUint8, {64 << 20}, device)) {
    for (int i = 0; i < kNumShapes; ++i) layers_.emplace_back(buffer_, kShapes[i], i, stream_);
  }

  std::string run(int calls) {
    const int look_every = std::max(100, calls / kLooks);
    std::string wrong;
    for (int i = 0; i < calls && wrong.empty(); ++i) {
      Layer& layer = layers_[static_cast<std::size_t>((i * 7 / 3) % kNumShapes)];
      const CombineResult sums = call(layer, true);
      if (i % look_every < look_every - 1) continue;
      wrong = look(layer, sums);
      if (!wrong.empty()) wrong = fmt::format("call {}: {}", i, wrong);
    }
    return wrong;
  }

 private:
  CombineResult call(Layer& layer, bool read) {
    layer.last = (layer.last + 1) % kVariants;
    DispatchArgs args;
    args.options.stream = {stream_};
    args.x = layer.xs[static_cast<std::size_t>(layer.last)];
    args.handle = layer.handle;
    DispatchResult got = buffer_.dispatch(args);
    CombineArgs back;
    back.options.stream = {stream_};
    back.x = got.recv_x;
    back.handle = layer.handle;
    CombineResult sums = buffer_.combine(back);
    if (read) read_late(layer, got);
    return sums;
  }

  /// Sums of the last call, and what the other stream read of the last calls of all layers, while
  /// more calls, of which it reads nothing, use the memory again.
  std::string look(Layer& layer, const CombineResult& sums) {
    for (Layer& one : layers_) (void)call(one, true);
    const auto variant = static_cast<std::size_t>(layer.last == 0 ? kVariants - 1 : layer.last - 1);
    for (int i = 0; i < 24; ++i)
      (void)call(layers_[static_cast<std::size_t>(i % kNumShapes)], false);
    const Tensor here = sums.combined_x.to({}, {stream_});
    std::string wrong = layer.rounds[variant].check_sums(layer.shape, here.as<float>(), "sums");
    for (const Layer& one : layers_) {
      if (wrong.empty()) wrong = check_copy(one);
    }
    return wrong;
  }

  /// On the other stream, behind the dispatch: some slow work, then a copy of the rows, which are
  /// given up at once.
  void read_late(Layer& layer, DispatchResult& got) {
    got.event.current_stream_wait({reader_});
    for (int i = 0; i < 4; ++i)
      check(cudaMemsetAsync(ballast_.data, i, ballast_.nbytes(), reader_), "cudaMemsetAsync");
    if (got.recv_x.nbytes() > 0) {
      check(cudaMemcpyAsync(layer.copy.data, got.recv_x.data, got.recv_x.nbytes(),
                            cudaMemcpyDeviceToDevice, reader_),
            "cudaMemcpyAsync");
    }
    got.recv_x.release({reader_});
    layer.read = layer.last;
  }

  std::string check_copy(const Layer& layer) const {
    const Tensor rows = layer.copy.to({}, {reader_});
    const Tensor tokens = layer.handle.recv_src_idx.to({}, {reader_});
    const Tensor prefix = layer.handle.rank_prefix_matrix.to({}, {reader_});
    const int ranks = buffer_.num_ranks();
    const int number = layer.number + layer.read * kNumShapes;
    std::int64_t row = 0;
    for (int source = 0; source < ranks; ++source) {
      for (; row < prefix.as<std::int32_t>()[source * ranks + buffer_.rank()]; ++row) {
        for (std::int64_t i = 0; i < layer.shape.hidden; ++i) {
          const float want = Round::value(number, source, tokens.as<std::int32_t>()[row], i);
          const float got = rows.as<float>()[row * layer.shape.hidden + i];
          if (got != want)
            return fmt::format("the other stream read {} in row {}, column {}, not {}", got, row, i,
                               want);
        }
      }
    }
    return "";
  }

  cudaStream_t stream_;
  cudaStream_t reader_;
  Buffer buffer_;
  Tensor ballast_;
  std::vector<Layer> layers_{};
};

std::string play(Worker& worker, const std::string& job) {
  const int calls = std::stoi(job);
  return Stress(worker, device_of(worker)).run(shares_gpu(worker) ? calls : std::max(calls, kMany));
}

}  // namespace
}  // namespace deep_ep::test

int main(int argc, char** argv) {
  return deep_ep::test::run_on_ranks(3, deep_ep::test::play, argc > 1 ? argv[1] : "1000");
}
