#include "base/trace.hpp"
#include "identity.hpp"

// A dispatch without a handle is queued before the host knows how many rows come, into room for as
// many as came before. More rows, fewer, and none: what callers see is the same, and it is queued
// once more only when they do not fit.
namespace deep_ep::test {
namespace {

constexpr Shape kShape{600, 512, 1};

/// A call in which the first `sent` tokens of every rank go to all ranks, and its dispatches.
struct Step {
  std::int64_t sent;
  int dispatches;
};
constexpr Step kSteps[] = {
    {100, 1},                      // nothing is known
    {100, 1}, {600, 2}, {600, 1},  // as many, more, as many
    {590, 1}, {0, 1},   {600, 2},  // a few less, none, as many as before that
    {0, 1},   {0, 1},   {0, 1},   {20, 1},
};

std::string check_rows(const DispatchResult& got, int number, std::int64_t sent,
                       const Worker& worker, cudaStream_t stream) {
  const std::int64_t rows = sent * worker.num_ranks();
  if (got.num_recv_tokens != rows || got.recv_x.shape[0] != rows ||
      got.handle.recv_src_idx.shape[0] != rows || got.recv_topk_idx.shape[0] != rows)
    return fmt::format("call {}: {} rows, recv_x {}, not {}", number, got.num_recv_tokens,
                       got.recv_x.describe(), rows);
  if (rows == 0) return "";
  const Tensor x = got.recv_x.to({}, {stream});
  const Tensor from = got.handle.recv_src_idx.to({}, {stream});
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t token = row % sent;
    if (from.as<std::int32_t>()[row] != token)
      return fmt::format("call {}: row {} is of token {}", number, row,
                         from.as<std::int32_t>()[row]);
    const int rank = static_cast<int>(row / sent);
    for (std::int64_t i = 0; i < kShape.hidden; ++i) {
      const float seen = x.as<float>()[row * kShape.hidden + i];
      if (seen != Round::value(number, rank, token, i))
        return fmt::format("call {}: recv_x[{}, {}] is {}", number, row, i, seen);
    }
  }
  return "";
}

std::string play(Worker& worker, const std::string&) {
  const Device device = device_of(worker);
  cudaStream_t stream = make_stream();
  static int dispatches;  // the hook outlives this call
  trace::set_hook([](std::string_view step) { dispatches += step == "intranode::dispatch"; });
  const int ranks = worker.num_ranks();
  Buffer buffer(worker.bootstrap(), {.device = device, .timeout = std::chrono::seconds(20)});
  std::vector<DispatchResult> live;
  int number = 0;
  for (const Step& step : kSteps) {
    Shape shape = kShape;
    shape.topk = ranks;
    Round round(shape, number, worker.rank(), ranks);
    for (std::int64_t i = 0; i < shape.tokens * ranks; ++i)
      round.ids[static_cast<std::size_t>(i)] = i / ranks < step.sent ? 2 * (i % ranks) : -1;
    for (std::int64_t token = 0; token < shape.tokens; ++token)
      round.copies[static_cast<std::size_t>(token)] = token < step.sent ? ranks : 0;
    const Tensor x = Tensor::empty(DType::kFloat32, {shape.tokens, shape.hidden}, device);
    const Tensor ids = Tensor::empty(DType::kInt64, {shape.tokens, shape.topk}, device);
    copy_in(x, round.x.data(), stream);
    copy_in(ids, round.ids.data(), stream);
    DispatchArgs args;
    args.options.stream = {stream};
    args.x = x;
    args.topk_idx = ids;
    args.layout = buffer.get_dispatch_layout(ids, 2 * ranks, args.options);
    dispatches = 0;
    live.push_back(buffer.dispatch(args));
    if (dispatches != step.dispatches)
      return fmt::format("call {} took {} dispatches, not {}", number, dispatches, step.dispatches);
    CombineArgs back;
    back.options.stream = {stream};
    back.x = live.back().recv_x;
    back.handle = live.back().handle;
    const Tensor sums = buffer.combine(back).combined_x.to({}, {stream});
    std::string wrong = round.check_sums(shape, sums.as<float>(), "sums");
    if (!wrong.empty()) return fmt::format("call {}: {}", number, wrong);
    ++number;
  }
  for (int i = 0; i < number; ++i) {
    std::string wrong =
        check_rows(live[static_cast<std::size_t>(i)], i, kSteps[i].sent, worker, stream);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

}  // namespace
}  // namespace deep_ep::test

int main() { return deep_ep::test::run_on_ranks(4, deep_ep::test::play, ""); }
