#include "bench_low_latency.hpp"

#include <chrono>
#include <functional>
#include <memory>

#include "verify/low_latency_checks.hpp"
#include "verify/low_latency_inputs.hpp"
#include "verify/transfer.hpp"

namespace deep_ep::cli {
namespace {

using Clock = std::chrono::steady_clock;

/// What one rank passes, and what it must get.
struct Round {
  Round(const verify::LowLatencyCase& c, int number, const Buffer& buffer)
      : expected(c, number), inputs(c, expected, buffer.rank()) {
    const auto input = [&](const Tensor& tensor) {
      return verify::on_device(tensor, buffer.device());
    };
    x = input(inputs.x());
    scales = input(inputs.scales());
    ids = input(inputs.topk_idx());
    weights = input(inputs.topk_weights());
    y = input(inputs.expert_rows(number));
  }

  verify::LowLatencyExpected expected;
  verify::LowLatencyInputs inputs;
  Tensor x, scales, ids, weights, y;
};

class LowLatencyPoint {
 public:
  LowLatencyPoint(Buffer& buffer, const verify::LowLatencyCase& c,
                  const LowLatencyBenchSettings& settings)
      : buffer_(buffer), case_(c), settings_(settings), rows_(c) {
    round_ = std::make_unique<Round>(case_, 0, buffer_);
    dispatch(false);
    wait();
  }

  std::vector<BenchRow> run() {
    std::vector<BenchRow> rows;
    for (const bool hook : {false, true}) {
      const auto name = [hook](const char* operation) {
        return std::string(operation) + (hook ? "_hook" : "");
      };
      rows.push_back(measure(name("dispatch"), {hook, true, false}));
      rows.push_back(measure(name("combine"), {hook, false, true}));
      rows.push_back(measure(name("pair"), {hook, true, true}));
    }
    return rows;
  }

 private:
  struct What {
    bool hook;
    bool dispatch;
    bool combine;
  };

  CallOptions options() const {
    CallOptions options;
    options.stream = settings_.on_comm_stream ? buffer_.comm_stream() : verify::own_stream();
    return options;
  }

  void dispatch(bool hook) {
    LowLatencyDispatchArgs args;
    args.x = round_->x;
    args.x_scales = round_->scales;
    args.topk_idx = round_->ids;
    if (case_.rank_major) args.topk_weights = round_->weights;
    args.num_max_dispatch_tokens_per_rank = static_cast<int>(case_.capacity());
    args.num_experts = case_.experts;
    args.use_fp8 = rows_.use_fp8;
    args.round_scale = rows_.round_scale;
    args.use_ue8m0 = rows_.use_ue8m0;
    args.format = case_.rank_major ? LowLatencyFormat::kRankMajor : LowLatencyFormat::kExpertMajor;
    args.options = options();
    args.return_recv_hook = hook;
    dispatched_ = {};
    dispatched_ = buffer_.low_latency_dispatch(args);
    if (hook) dispatched_.recv_hook();
    last_ = dispatched_.event;
  }

  void combine(bool hook) {
    LowLatencyCombineArgs args;
    args.x = round_->y;
    args.topk_idx = round_->ids;
    if (!case_.rank_major) args.topk_weights = round_->weights;
    args.handle = dispatched_.handle;
    args.options = options();
    args.return_recv_hook = hook;
    combined_ = {};
    combined_ = buffer_.low_latency_combine(args);
    if (hook) combined_.recv_hook();
    last_ = combined_.event;
  }

  // A call with a hook has no event: what it queued is on the stream.
  void wait() {
    if (buffer_.device().type == DeviceType::kCuda) {
      Stream stream = options().stream;
      stream.device = buffer_.device();
      EventHandle(stream).host_wait();
    }
    last_.host_wait();
  }

  double time_of(const What& what) {
    buffer_.barrier();
    const auto start = Clock::now();
    for (int n = 0; n < settings_.chain; ++n) {
      if (what.dispatch) dispatch(what.hook);
      if (what.combine) combine(what.hook);
    }
    wait();
    return std::chrono::duration<double, std::micro>(Clock::now() - start).count() /
           settings_.chain;
  }

  BenchRow measure(std::string name, const What& what) {
    BenchRow row{std::move(name)};
    for (int i = -settings_.warmup; i < settings_.iterations; ++i) {
      // New rows in the last iteration: results that an earlier call left behind would be wrong.
      if (settings_.check && i + 1 == settings_.iterations) load_next(what);
      const double time = time_of(what);
      if (i >= 0) row.times_us.push_back(time);
    }
    count_bytes(row, what);
    if (settings_.check) check(row, what);
    return row;
  }

  void load_next(const What& what) {
    const int number = round_->expected.round + 1;
    round_ = std::make_unique<Round>(case_, number, buffer_);
    if (what.dispatch) return;
    dispatch(false);  // whose handle the combines take
    wait();
  }

  void count_bytes(BenchRow& row, const What& what) const {
    const auto& received = round_->expected.received[static_cast<std::size_t>(buffer_.rank())];
    double rows = 0;
    double wire = 0;
    for (const auto& group : received.groups) {
      for (const std::int32_t source : group.src_rank) {
        rows += 1;
        wire += source != buffer_.rank() ? 1 : 0;
      }
    }
    double bytes = 0;
    if (what.dispatch)
      bytes += static_cast<double>(case_.hidden) * static_cast<double>(size_of(rows_.recv_dtype)) +
               4.0 * rows_.num_scales;
    if (what.combine) bytes += 2.0 * static_cast<double>(case_.hidden);
    row.logical_bytes = rows * bytes;
    row.wire_bytes = wire * bytes;
  }

  void check(BenchRow& row, const What& what) {
    verify::LowLatencyChecks checks(case_, buffer_.rank());
    if (what.dispatch) checks.dispatched(verify::on_host(dispatched_), round_->expected);
    if (what.combine)
      checks.combined(verify::on_host(combined_.combined_x), round_->expected,
                      round_->expected.round);
    row.checked_elements = checks.result().checked_elements;
    row.wrong_elements = checks.result().wrong_elements;
    row.first_mismatch = checks.result().first_mismatch;
  }

  Buffer& buffer_;
  const verify::LowLatencyCase& case_;
  const LowLatencyBenchSettings& settings_;
  const verify::LowLatencyRows rows_;
  std::unique_ptr<Round> round_;
  LowLatencyDispatchResult dispatched_;
  LowLatencyCombineResult combined_;
  EventHandle last_;
};

}  // namespace

std::vector<BenchRow> bench_low_latency(Buffer& buffer, Bootstrap& bootstrap,
                                        const verify::LowLatencyCase& c,
                                        const LowLatencyBenchSettings& settings) {
  return merge_rows(bootstrap, LowLatencyPoint(buffer, c, settings).run());
}

}  // namespace deep_ep::cli
