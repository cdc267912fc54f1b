#include "bench_intranode.hpp"

#include <chrono>
#include <cstring>
#include <deque>
#include <functional>

#include "backend/plugin.hpp"
#include "base/error.hpp"
#include "names.hpp"
#include "verify/checks.hpp"
#include "verify/transfer.hpp"

namespace deep_ep::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr const char* kCachedPair = "pair_cached";

double microseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

std::vector<verify::RankRouting> make_routings(const verify::Case& c,
                                               const BenchSettings& settings) {
  std::vector<verify::RankRouting> routings;
  for (int rank = 0; rank < c.ranks; ++rank) {
    verify::RoutingSpec spec;
    spec.routing = settings.routing;
    spec.tokens = c.tokens_of(rank);
    spec.topk = c.topk;
    spec.experts = c.experts;
    spec.ranks = c.ranks;
    spec.rank = rank;
    spec.seed = settings.seed;
    spec.skew = settings.skew;
    auto ids =
        settings.table ? take_rows(*settings.table, rank, spec.tokens) : verify::make_routing(spec);
    routings.push_back({std::move(ids), verify::make_topk_weights(c, rank)});
  }
  return routings;
}

/// The buffers of one shape on one rank and the calls that are timed on them.
class Point {
 public:
  Point(Buffer& buffer, const BenchShape& shape, const BenchSettings& settings)
      : buffer_(buffer),
        settings_(settings),
        case_(make_bench_case(shape, settings, buffer.num_ranks())),
        expected_(verify::make_expected(case_, make_routings(case_, settings), buffer.rank())),
        inputs_(case_, expected_),
        topk_idx_(verify::on_device(inputs_.topk_idx(), buffer.device())),
        topk_weights_(verify::on_device(inputs_.topk_weights(), buffer.device())),
        config_(settings.config) {
    config_.num_sms = shape.num_sms;
    load(0);
    find_layout();
    take_handle(dispatch());
  }

  std::vector<BenchRow> run();

 private:
  struct Operation {
    const char* name;
    double bytes_per_row;
    std::function<void()> call;
    std::function<void(verify::Checks&)> check;
    bool in_graph = false;  // it waits for nothing on the host
    int crossings = 1;      // of a row
  };

  // New rows in the same memory: results that an earlier call left behind would be wrong.
  void load(int round) {
    round_ = round;
    copy_into(x_, inputs_.x(round));
    copy_into(scales_, inputs_.scales(round));
    copy_into(y_, inputs_.combine_x(round));
    copy_into(y_weights_, inputs_.combine_weights(round));
  }
  void copy_into(Tensor& to, const Tensor& from) const {
    if (!to.defined()) {
      to = verify::on_device(from, buffer_.device());
    } else if (buffer_.device().type == DeviceType::kCuda) {
      const Tensor there = verify::on_device(from, buffer_.device());
      cuda_parts().copy(to.data, there.data, static_cast<std::int64_t>(to.nbytes()), stream());
    } else if (from.nbytes() > 0) {
      std::memcpy(to.data, from.data, from.nbytes());
    }
  }

  DispatchResult dispatch();
  DispatchResult dispatch_cached();
  CombineResult combine(const DispatchResult& dispatched);
  void take_handle(const DispatchResult& dispatched) {
    handle_.handle = dispatched.handle;
    handle_.internode_handle = dispatched.internode_handle;
  }

  // Lets go of the oldest result, so that the next one makes live_results of them.
  void make_room() {
    while (static_cast<int>(results_.size()) >= settings_.live_results) results_.pop_front();
  }
  void call_dispatch() {
    make_room();
    results_.push_back(dispatch());
    last_ = results_.back().event;
  }
  void call_dispatch_cached() {
    make_room();
    results_.push_back(dispatch_cached());
    last_ = results_.back().event;
  }
  void call_combine(const DispatchResult& dispatched) {
    combined_ = {};
    combined_ = combine(dispatched);
    last_ = combined_.event;
  }

  Stream stream() const {
    Stream stream = settings_.on_comm_stream ? buffer_.comm_stream() : verify::own_stream();
    stream.device = buffer_.device();
    return stream;
  }
  void find_layout() {
    layout_ =
        buffer_.get_dispatch_layout(topk_idx_, case_.experts, {.stream = verify::own_stream()});
    last_ = layout_.event;
  }

  std::vector<Operation> operations();
  BenchRow measure(const Operation& operation);
  BenchRow measure_chained(const Operation& pair);
  BenchRow measure_graph(const Operation& operation);
  void time(const Operation& operation, int chain, BenchRow& row);
  void finish(BenchRow& row, const Operation& operation);

  Buffer& buffer_;
  const BenchSettings& settings_;
  const verify::Case case_;
  const verify::Expected expected_;
  const verify::CaseInputs inputs_;
  Tensor topk_idx_, topk_weights_, x_{}, scales_{}, y_{}, y_weights_{};
  int round_ = 0;
  Config config_;
  EventHandle last_{};  // of the last call
  DispatchLayout layout_{};
  DispatchResult handle_{};  // with nothing but the handle
  std::deque<DispatchResult> results_{};
  CombineResult combined_{};
};

DispatchResult Point::dispatch() {
  DispatchArgs args;
  args.x = x_;
  args.x_scales = scales_;
  args.layout = layout_;
  args.topk_idx = topk_idx_;
  args.topk_weights = topk_weights_;
  args.config = config_;
  args.options.stream = stream();
  return buffer_.dispatch(args);
}

DispatchResult Point::dispatch_cached() {
  DispatchArgs args;
  args.x = x_;
  args.x_scales = scales_;
  if (settings_.ranks_per_node > 0) {
    args.internode_handle = handle_.internode_handle;
  } else {
    args.handle = handle_.handle;
  }
  args.config = config_;
  args.options.stream = stream();
  return buffer_.dispatch(args);
}

CombineResult Point::combine(const DispatchResult& dispatched) {
  CombineArgs args;
  args.x = y_;
  args.handle = dispatched.handle;
  args.internode_handle = dispatched.internode_handle;
  args.topk_weights = y_weights_;
  args.config = config_;
  args.options.stream = stream();
  return buffer_.combine(args);
}

std::vector<Point::Operation> Point::operations() {
  const double sent =
      static_cast<double>(case_.hidden) * static_cast<double>(size_of(case_.dtype)) +
      4.0 * verify::num_scales(case_);
  const double returned =
      static_cast<double>(case_.hidden) * static_cast<double>(size_of(case_.combine_dtype));
  const auto check_rows = [this](verify::Checks& checks) {
    checks.payload(verify::on_host(results_.back()), round_);
  };
  const auto check_first = [this](verify::Checks& checks) {
    checks.first_dispatch(verify::on_host(results_.back()));
    checks.payload(verify::on_host(results_.back()), round_);
  };
  const auto check_sums = [this](verify::Checks& checks) {
    checks.combined(verify::on_host(combined_), round_);
  };
  return {
      {"layout", 0, [this] { find_layout(); },
       [this](verify::Checks& checks) { checks.layout(verify::on_host(layout_)); }},
      {"dispatch", sent, [this] { call_dispatch(); }, check_first},
      {"dispatch_cached", sent, [this] { call_dispatch_cached(); }, check_rows, true},
      {"combine", returned, [this] { call_combine(handle_); }, check_sums, true},
      {kCachedPair, sent + returned,
       [this] {
         call_dispatch_cached();
         call_combine(handle_);
       },
       [=](verify::Checks& checks) {
         check_rows(checks);
         check_sums(checks);
       },
       true, 2},
      {"layout_pair", sent + returned,
       [this] {
         find_layout();
         call_dispatch();
         call_combine(results_.back());
       },
       [=](verify::Checks& checks) {
         check_first(checks);
         check_sums(checks);
       },
       false, 2},
  };
}

// What does not come from the clock: bytes and the comparison with the reference.
void Point::finish(BenchRow& row, const Operation& operation) {
  std::int64_t from_others = 0;
  for (const verify::RowSource& source : expected_.sources)
    from_others += source.rank != expected_.rank ? 1 : 0;
  row.logical_bytes = operation.bytes_per_row * static_cast<double>(expected_.received.num_rows);
  row.wire_bytes = operation.bytes_per_row * static_cast<double>(from_others);
  if (settings_.check) {
    verify::Checks checks(case_, expected_, inputs_);
    operation.check(checks);
    row.checked_elements = checks.result().checked_elements;
    row.wrong_elements = checks.result().wrong_elements;
    row.first_mismatch = checks.result().first_mismatch;
  }
}

/// Adds microseconds a call, of `chain` calls that follow each other without a barrier.
void Point::time(const Operation& operation, int chain, BenchRow& row) {
  buffer_.barrier();
  const auto start = Clock::now();
  for (int n = 0; n < chain; ++n) operation.call();
  if (buffer_.device().type == DeviceType::kCuda)
    row.host_us.push_back(microseconds(Clock::now() - start) / chain);
  last_.host_wait();
  row.times_us.push_back(microseconds(Clock::now() - start) / chain);
}

BenchRow Point::measure(const Operation& operation) {
  BenchRow row{operation.name};
  const std::int64_t rows = buffer_.network_counts().rows;
  for (int i = 0; i < settings_.warmup; ++i) operation.call();
  for (int i = 0; i < settings_.iterations; ++i) {
    if (settings_.check && i + 1 == settings_.iterations) load(round_ + 1);
    time(operation, settings_.chain, row);
  }
  // A pair takes rows there and back, of as many bytes on the average as one of its two calls.
  const auto calls =
      static_cast<double>(settings_.warmup + std::int64_t{settings_.iterations} * settings_.chain);
  row.node_bytes = static_cast<double>(buffer_.network_counts().rows - rows) / calls *
                   operation.bytes_per_row / operation.crossings;
  finish(row, operation);
  return row;
}

// Pairs that follow each other without a barrier, as layers do. A barrier's exit is itself some
// microseconds wide, which is what small shapes take.
BenchRow Point::measure_chained(const Operation& pair) {
  constexpr int kChain = 50;
  BenchRow row{"pair_cached_chained"};
  for (int i = 0; i < settings_.iterations + 1; ++i) {
    if (i == 1) row.times_us.clear(), row.host_us.clear();  // the first chain warms up
    time(pair, kChain, row);
  }
  finish(row, pair);
  return row;
}

// A chain as a CUDA graph, by the GPU's clock. It keeps the results of all of its calls.
BenchRow Point::measure_graph(const Operation& operation) {
  BenchRow row{std::string(operation.name) + "_graph"};
  operation.call();
  last_.host_wait();
  const auto graph = cuda_parts().capture(stream(), [&] {
    for (int n = 0; n < settings_.chain; ++n) operation.call();
  });
  for (int i = 0; i < settings_.warmup + settings_.iterations; ++i) {
    if (i == settings_.warmup) row.times_us.clear();
    if (settings_.check && i + 1 == settings_.warmup + settings_.iterations) load(round_ + 1);
    buffer_.barrier();
    row.times_us.push_back(graph->time_us() / settings_.chain);
  }
  buffer_.check();
  finish(row, operation);
  return row;
}

std::vector<BenchRow> Point::run() {
  std::vector<BenchRow> rows;
  for (const Operation& operation : operations()) {
    rows.push_back(measure(operation));
    if (settings_.graph && operation.in_graph) rows.push_back(measure_graph(operation));
    if (settings_.pair_latency && rows.back().operation == kCachedPair)
      rows.push_back(measure_chained(operation));
  }
  return rows;
}

}  // namespace

verify::Case make_bench_case(const BenchShape& shape, const BenchSettings& settings, int ranks) {
  verify::Case c;
  c.ranks = ranks;
  c.ranks_per_node = settings.ranks_per_node;
  c.tokens = {shape.tokens};
  c.hidden = shape.hidden;
  c.dtype = shape.dtype;
  c.combine_dtype = combine_dtype_for(shape.dtype);
  if (shape.dtype == DType::kFloat8E4m3) c.scales = verify::Scales::kFloat32;
  c.topk = shape.topk;
  c.experts = shape.experts;
  c.seed = settings.seed;
  return c;
}

std::vector<BenchRow> bench_intranode(Buffer& buffer, Bootstrap& bootstrap, const BenchShape& shape,
                                      const BenchSettings& settings) {
  return merge_rows(bootstrap, Point(buffer, shape, settings).run());
}

}  // namespace deep_ep::cli
