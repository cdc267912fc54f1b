#include "bench_low_latency.hpp"

#include <chrono>
#include <functional>
#include <memory>

#include "backend/plugin.hpp"
#include "base/error.hpp"
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

  /// Takes the place of `other` on the device: its memory, with the rows of this one.
  void move_to(const Round& other, Stream stream) {
    const std::pair<Tensor*, const Tensor*> arrays[] = {{&x, &other.x},
                                                        {&scales, &other.scales},
                                                        {&ids, &other.ids},
                                                        {&weights, &other.weights},
                                                        {&y, &other.y}};
    for (const auto& [own, place] : arrays) {
      if (!own->defined()) continue;
      cuda_parts().copy(place->data, own->data, static_cast<std::int64_t>(own->nbytes()), stream);
      *own = *place;
    }
  }

  verify::LowLatencyExpected expected;
  verify::LowLatencyInputs inputs;
  Tensor x, scales, ids, weights, y;
};

class LowLatencyPoint {
 public:
  LowLatencyPoint(Buffer& buffer, const verify::LowLatencyCase& c,
                  const LowLatencyBenchSettings& settings, BenchMode mode)
      : buffer_(buffer), case_(c), settings_(settings), mode_(mode), rows_(c) {
    round_ = std::make_unique<Round>(case_, 0, buffer_);
    dispatch(false);
    combine(false);
    wait();
    if (mode_ == BenchMode::kGraph) keep_results();
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

  // A graph keeps what its calls allocate, so they all get the results of the first calls.
  void keep_results() {
    kept_dispatched_ = dispatched_;
    kept_combined_ = combined_;
    outputs_.recv_x = kept_dispatched_.recv_x;
    outputs_.recv_x_scales = kept_dispatched_.recv_x_scales;
    outputs_.recv_count = kept_dispatched_.recv_count;
    outputs_.recv_topk_idx = kept_dispatched_.recv_topk_idx;
    outputs_.recv_topk_weights = kept_dispatched_.recv_topk_weights;
    outputs_.src_info = kept_dispatched_.handle.src_info;
    outputs_.layout_range = kept_dispatched_.handle.layout_range;
    out_ = kept_combined_.combined_x;
  }

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
    args.outputs = outputs_;
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
    args.use_logfmt = case_.wire == plan::WireFormat::kLogFmt;
    args.use_fp8 = case_.wire == plan::WireFormat::kFp8;
    args.out = out_;
    args.options = options();
    args.return_recv_hook = hook;
    combined_ = {};
    combined_ = buffer_.low_latency_combine(args);
    if (hook) combined_.recv_hook();
    last_ = combined_.event;
  }

  Stream stream() const {
    Stream stream = options().stream;
    stream.device = buffer_.device();
    return stream;
  }

  // A call with a hook has no event: what it queued is on the stream.
  void wait() {
    if (buffer_.device().type == DeviceType::kCuda) EventHandle(stream()).host_wait();
    last_.host_wait();
  }

  void run_chain(const What& what) {
    for (int n = 0; n < settings_.chain; ++n) {
      if (what.dispatch) dispatch(what.hook);
      if (what.combine) combine(what.hook);
    }
  }

  /// Adds the time of a call.
  void time(const What& what, CapturedCalls* graph, BenchRow& row) {
    buffer_.barrier();
    if (graph != nullptr) {
      row.times_us.push_back(graph->time_us() / settings_.chain);
      return;
    }
    const auto start = Clock::now();
    const auto add = [&](std::vector<double>& times) {
      const std::chrono::duration<double, std::micro> time = Clock::now() - start;
      times.push_back(time.count() / settings_.chain);
    };
    run_chain(what);
    if (buffer_.device().type == DeviceType::kCuda) add(row.host_us);
    wait();
    add(row.times_us);
  }

  BenchRow measure(std::string name, const What& what) {
    BenchRow row{std::move(name)};
    std::unique_ptr<CapturedCalls> graph;
    if (mode_ == BenchMode::kGraph) {
      run_chain(what);
      wait();
      graph = cuda_parts().capture(stream(), [&] { run_chain(what); });
    }
    for (int i = -settings_.warmup; i < settings_.iterations; ++i) {
      // New rows in the last iteration: results that an earlier call left behind would be wrong.
      if (settings_.check && i + 1 == settings_.iterations) load_next(what);
      if (i == 0) row.times_us.clear(), row.host_us.clear();  // those before warm up
      time(what, graph.get(), row);
    }
    buffer_.check();
    count_bytes(row, what);
    if (settings_.check) check(row, what);
    return row;
  }

  void load_next(const What& what) {
    auto next = std::make_unique<Round>(case_, round_->expected.round + 1, buffer_);
    if (mode_ == BenchMode::kGraph) next->move_to(*round_, stream());
    round_ = std::move(next);
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
    if (what.combine) bytes += static_cast<double>(plan::wire_row_bytes(case_.wire, case_.hidden));
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
  const BenchMode mode_;
  const verify::LowLatencyRows rows_;
  std::unique_ptr<Round> round_;
  LowLatencyDispatchResult kept_dispatched_;  // whose memory all calls of graphs write
  LowLatencyCombineResult kept_combined_;
  LowLatencyOutputs outputs_{};
  TensorView out_{};
  LowLatencyDispatchResult dispatched_;
  LowLatencyCombineResult combined_;
  EventHandle last_;
};

}  // namespace

const char* to_string(BenchMode mode) { return mode == BenchMode::kGraph ? "graph" : "eager"; }
BenchMode bench_mode_from(std::string_view name) {
  require(name == "eager" || name == "graph", "--mode '{}' must be eager or graph", name);
  return name == "graph" ? BenchMode::kGraph : BenchMode::kEager;
}

std::vector<BenchRow> bench_low_latency(Buffer& buffer, Bootstrap& bootstrap,
                                        const verify::LowLatencyCase& c,
                                        const LowLatencyBenchSettings& settings, BenchMode mode) {
  return merge_rows(bootstrap, LowLatencyPoint(buffer, c, settings, mode).run());
}

}  // namespace deep_ep::cli
