#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>

#include "backend/plugin.hpp"
#include "base/error.hpp"
#include "verify/low_latency_checks.hpp"
#include "verify/low_latency_inputs.hpp"
#include "verify/low_latency_turns.hpp"
#include "verify/transfer.hpp"

namespace deep_ep::verify {
namespace {

struct DispatchCall {
  Tensor x, scales, ids, weights, wait_stats;
  LowLatencyOutputs outputs;
  std::vector<Tensor> outputs_alive;
  LowLatencyDispatchResult got;
};

struct CombineCall {
  Tensor x, ids, weights, wait_stats, out;
  LowLatencyHandle handle;
  LowLatencyCombineResult got;
};

class LowLatencyRun {
 public:
  LowLatencyRun(Buffer& buffer, const LowLatencyCase& c)
      : buffer_(buffer),
        case_(c),
        rows_(c),
        rank_(buffer.rank()),
        checks_(c, buffer.rank()),
        dispatches_(static_cast<std::size_t>(c.dispatches)),
        combines_(static_cast<std::size_t>(c.combines)) {
    for (int i = 0; i < c.dispatches; ++i) expected_.emplace_back(c, i);
  }

  CaseResult go() {
    if (case_.masked == rank_) {
      checks_.expect(true, "a masked rank takes no part");
      return checks_.result();
    }
    if (case_.masked != LowLatencyCase::kNobody)
      buffer_.low_latency_update_mask_buffer(case_.masked, true);
    if (case_.stats)
      expert_stats_ = input(host_values<std::int32_t>(DType::kInt32, {case_.experts / case_.ranks},
                                                      LowLatencyChecks::kStatsStart));
    for (const Turn& turn : make_turns(case_, rank_)) play(turn);
    event_.host_wait();
    for (const auto& check : late_checks_) check();
    check_end();
    return checks_.result();
  }

  /// After an Error: calls that are still queued read inputs that this object owns.
  void settle() {
    try {
      event_.host_wait();
    } catch (const Error&) {
    }
  }

 private:
  Tensor input(const Tensor& tensor) const { return on_device(tensor, buffer_.device()); }
  /// An empty tensor may point nowhere.
  TensorView passed(TensorView view) const {
    if (view.numel() == 0 && (case_.seed + static_cast<std::uint64_t>(rank_)) % 2 == 0)
      view.data = nullptr;
    return view;
  }
  bool hooked() const { return case_.hooks != Hooks::kNone; }
  std::int64_t groups() const { return expected_[0].num_groups(); }
  std::int64_t rows_of_group() const {
    return case_.rank_major ? case_.capacity() : case_.ranks * case_.capacity();
  }

  CallOptions options() const {
    CallOptions options;
    options.stream = own_stream();
    options.async_finish = case_.async;
    if (case_.async) options.previous_event = event_;
    return options;
  }

  void play(const Turn& turn) {
    if (turn.send) {
      turn.combine ? combine(turn.number) : dispatch(turn.number);
      return;
    }
    const auto number = static_cast<std::size_t>(turn.number);
    const auto& hook =
        turn.combine ? combines_[number].got.recv_hook : dispatches_[number].got.recv_hook;
    if (hooked()) hook();
    auto check = [this, turn] {
      turn.combine ? check_combine(turn.number) : check_dispatch(turn.number);
    };
    if (case_.async) {
      late_checks_.push_back(check);
    } else {
      check();
    }
  }

  Tensor make_wait_stats() const {
    if (!case_.stats) return {};
    return input(
        host_values<std::int64_t>(DType::kInt64, {case_.ranks}, LowLatencyChecks::kStatsStart));
  }

  void make_outputs(DispatchCall& call) const {
    const auto make = [&](TensorView& view, DType dtype,
                          std::initializer_list<std::int64_t> shape) {
      call.outputs_alive.push_back(input(host_filled(dtype, shape, 0x5a)));
      view = call.outputs_alive.back();
    };
    make(call.outputs.recv_x, rows_.recv_dtype, {groups(), rows_of_group(), case_.hidden});
    make(call.outputs.recv_count, DType::kInt32, {groups()});
    make(call.outputs.src_info, DType::kInt32, {groups(), rows_of_group()});
    make(call.outputs.layout_range, DType::kInt64, {case_.rank_major ? 1 : groups(), case_.ranks});
    if (rows_.num_scales > 0) {
      make(call.outputs.recv_x_scales, rows_.scale_dtype,
           {groups(), rows_.num_scales, rows_of_group()});
      TensorView& scales = call.outputs.recv_x_scales;
      std::swap(scales.shape[1], scales.shape[2]);
      std::swap(scales.strides[1], scales.strides[2]);
    }
    if (!case_.rank_major) return;
    make(call.outputs.recv_topk_idx, case_.topk_dtype, {groups(), rows_of_group(), case_.topk});
    if (case_.weights)
      make(call.outputs.recv_topk_weights, DType::kFloat32,
           {groups(), rows_of_group(), case_.topk});
  }

  void dispatch(int number) {
    DispatchCall& call = dispatches_[static_cast<std::size_t>(number)];
    const LowLatencyInputs inputs(case_, expected_[static_cast<std::size_t>(number)], rank_);
    call.x = input(inputs.x());
    call.scales = input(inputs.scales());
    call.ids = input(inputs.topk_idx());
    if (case_.rank_major && case_.weights) call.weights = input(inputs.topk_weights());
    call.wait_stats = make_wait_stats();
    if (case_.own_outputs) make_outputs(call);
    LowLatencyDispatchArgs args;
    args.x = passed(call.x);
    args.x_scales = passed(call.scales);
    args.topk_idx = passed(call.ids);
    args.topk_weights = passed(call.weights);
    args.num_max_dispatch_tokens_per_rank = static_cast<int>(case_.capacity());
    args.num_experts = case_.experts;
    args.use_fp8 = rows_.use_fp8;
    args.round_scale = rows_.round_scale;
    args.use_ue8m0 = rows_.use_ue8m0;
    args.format = case_.rank_major ? LowLatencyFormat::kRankMajor : LowLatencyFormat::kExpertMajor;
    args.outputs = call.outputs;
    args.cumulative_local_expert_recv_stats = expert_stats_;
    args.dispatch_wait_recv_cost_stats = call.wait_stats;
    args.options = options();
    args.return_recv_hook = hooked();
    call.got = buffer_.low_latency_dispatch(args);
    if (!hooked()) event_ = call.got.event;
  }

  Tensor zero_copy_input(const Tensor& rows, const LowLatencyHandle& handle) {
    event_.host_wait();  // of the combine before the last, which read the same memory
    const Tensor view = buffer_.get_next_low_latency_combine_buffer(handle);
    checks_.expect(view.numel() == rows.numel() && view.dtype == rows.dtype,
                   "the combine buffer has the shape of the experts' outputs");
    if (view.device.type == DeviceType::kHost) {
      std::memcpy(view.data, rows.data, rows.nbytes());
    } else {
      Stream stream = own_stream();
      stream.device = view.device;
      cuda_parts().copy(view.data, rows.data, static_cast<std::int64_t>(rows.nbytes()), stream);
    }
    return view;
  }

  LowLatencyHandle clone(LowLatencyHandle handle) {
    event_.host_wait();
    handle.src_info = handle.src_info.to(handle.src_info.device, own_stream());
    handle.layout_range = handle.layout_range.to(handle.layout_range.device, own_stream());
    return handle;
  }

  void combine(int number) {
    CombineCall& call = combines_[static_cast<std::size_t>(number)];
    const auto from = static_cast<std::size_t>(dispatch_of(case_, number));
    const LowLatencyInputs inputs(case_, expected_[from], rank_);
    call.handle = dispatches_[from].got.handle;
    if (case_.clone_handle) call.handle = clone(call.handle);
    const Tensor rows = inputs.expert_rows(number);
    call.x = case_.zero_copy ? zero_copy_input(rows, call.handle) : input(rows);
    call.ids = input(inputs.topk_idx());
    if (!case_.rank_major) call.weights = input(inputs.topk_weights());
    call.wait_stats = make_wait_stats();
    if (case_.own_outputs)
      call.out = input(host_filled(DType::kBfloat16, {call.ids.shape[0], case_.hidden}, 0x5a));
    LowLatencyCombineArgs args;
    args.x = call.x;
    args.topk_idx = passed(call.ids);
    args.topk_weights = passed(call.weights);
    args.handle = call.handle;
    args.zero_copy = case_.zero_copy;
    args.use_logfmt = case_.wire == plan::WireFormat::kLogFmt;
    args.use_fp8 = case_.wire == plan::WireFormat::kFp8;
    args.out = passed(call.out);
    args.combine_wait_recv_cost_stats = call.wait_stats;
    args.options = options();
    args.return_recv_hook = hooked();
    call.got = buffer_.low_latency_combine(args);
    if (!hooked()) event_ = call.got.event;
  }

  void check_dispatch(int number) {
    const DispatchCall& call = dispatches_[static_cast<std::size_t>(number)];
    const LowLatencyExpected& expected = expected_[static_cast<std::size_t>(number)];
    checks_.stage(fmt::format("dispatch {}", number));
    if (!hooked()) call.got.event.host_wait();
    checks_.happened(call.got.event);
    checks_.dispatched(on_host(call.got), expected);
    checks_.unchanged_x(on_host(call.x), expected);
    checks_.wait_stats(on_host(call.wait_stats));
    if (!case_.own_outputs) return;
    checks_.expect(call.got.recv_x.data == call.outputs.recv_x.data &&
                       call.got.recv_count.data == call.outputs.recv_count.data &&
                       call.got.handle.src_info.data == call.outputs.src_info.data,
                   "results lie where the caller said");
  }

  void check_combine(int number) {
    const CombineCall& call = combines_[static_cast<std::size_t>(number)];
    const auto from = static_cast<std::size_t>(dispatch_of(case_, number));
    checks_.stage(fmt::format("combine {} (of dispatch {})", number, from));
    if (!hooked()) call.got.event.host_wait();
    checks_.happened(call.got.event);
    checks_.combined(on_host(call.got.combined_x), expected_[from], number);
    checks_.wait_stats(on_host(call.wait_stats));
    if (case_.own_outputs && call.out.numel() > 0)
      checks_.expect(call.got.combined_x.data == call.out.data, "combined_x is out");
  }

  void check_end() {
    for (std::size_t i = 0; i < dispatches_.size(); ++i) {
      checks_.stage(fmt::format("dispatch {}, after all calls", i));
      checks_.dispatched(on_host(dispatches_[i].got), expected_[i]);
    }
    checks_.stage("all calls");
    checks_.expert_stats(on_host(expert_stats_), expected_);
    if (case_.masked == LowLatencyCase::kNobody) return;
    const Tensor masks = input(host_filled(DType::kInt32, {case_.ranks}, 0x5a));
    buffer_.low_latency_query_mask_buffer(masks, own_stream());
    checks_.masks(on_host(masks));
  }

  Buffer& buffer_;
  const LowLatencyCase& case_;
  const LowLatencyRows rows_;
  int rank_;
  std::vector<LowLatencyExpected> expected_;
  LowLatencyChecks checks_;
  Tensor expert_stats_;
  std::vector<DispatchCall> dispatches_;
  std::vector<CombineCall> combines_;
  EventHandle event_{};
  std::vector<std::function<void()>> late_checks_{};
};

}  // namespace

CaseResult run_case(Buffer& buffer, const LowLatencyCase& c) {
  validate(c);
  require(c.ranks == buffer.num_ranks(), "the case is for {} ranks, the Buffer has {}", c.ranks,
          buffer.num_ranks());
  const int ranks_per_node = c.ranks_per_node == 0 ? c.ranks : c.ranks_per_node;
  require(ranks_per_node == buffer.num_ranks_per_node(),
          "the case is for nodes of {} ranks, the Buffer's have {}", ranks_per_node,
          buffer.num_ranks_per_node());
  LowLatencyRun run(buffer, c);
  try {
    return run.go();
  } catch (...) {
    run.settle();
    throw;
  }
}

}  // namespace deep_ep::verify
