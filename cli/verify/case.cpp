#include "verify/case.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstring>
#include <functional>

#include "base/error.hpp"
#include "verify/checks.hpp"
#include "verify/expected.hpp"
#include "verify/inputs.hpp"
#include "verify/outputs.hpp"
#include "verify/transfer.hpp"

namespace deep_ep::verify {
namespace {

Tensor clone_tensor(const Tensor& tensor) { return tensor.to(tensor.device, own_stream()); }

RowGroups clone(const RowGroups& groups) {
  return {clone_tensor(groups.group_offsets), clone_tensor(groups.grouped_rows),
          clone_tensor(groups.recv_rows),
          groups.weights.defined() ? clone_tensor(groups.weights) : Tensor()};
}

/// The calls of one case, in order, with the check of each one's outputs. Without async a call is
/// checked at once; with it, or to look again at results that were held, at the end.
class Run {
 public:
  Run(Buffer& buffer, const Case& c)
      : buffer_(buffer),
        case_(c),
        expected_(make_expected(c, make_routings(c), buffer.rank())),
        inputs_(c, expected_),
        checks_(c, expected_, inputs_) {}

  CaseResult go() {
    find_layout();
    dispatch();
    for (int round = 1; round <= case_.cached_repeats; ++round) dispatch_cached(round);
    for (int round = 1; round <= case_.combines; ++round) combine(round);
    event_.host_wait();
    for (const auto& check : late_checks_) check();
    checks_.stage("handle, after all calls", event_);
    if (several_nodes()) {
      checks_.handle(on_host(internode_handle_));
    } else {
      checks_.handle(on_host(handle_));
    }
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
  /// An empty tensor may point anywhere or, as those of torch do, nowhere: one rank's way this
  /// time, the other's next time.
  template <class AnyTensor>
  AnyTensor passed(AnyTensor tensor) const {
    if (tensor.numel() == 0 && (case_.seed + expected_.rank) % 2 == 0) tensor.data = nullptr;
    return tensor;
  }
  IntranodeHandle passed(IntranodeHandle handle) const {
    if (case_.clone_handle) handle = each_tensor(handle, clone_tensor);
    for (Tensor* tensor : {&handle.recv_src_idx, &handle.is_token_in_rank, &handle.send_head})
      *tensor = passed(*tensor);
    return handle;
  }

  InternodeHandle passed(InternodeHandle handle) const {
    if (case_.clone_handle) handle = each_tensor(handle, clone_tensor);
    for (Tensor* tensor : {&handle.recv_src_meta, &handle.is_token_in_rank, &handle.send_rdma_head,
                           &handle.send_nvl_head})
      *tensor = passed(*tensor);
    return handle;
  }
  bool several_nodes() const { return case_.node_size() < case_.ranks; }

  RowGroups passed(RowGroups groups) const {
    if (case_.clone_handle) groups = clone(groups);
    for (Tensor* tensor : {&groups.grouped_rows, &groups.recv_rows}) *tensor = passed(*tensor);
    return groups;
  }

  CallOptions options() const {
    CallOptions options;
    options.stream = own_stream();
    options.async_finish = case_.async;
    if (case_.async) options.previous_event = event_;
    return options;
  }

  /// An input as the Buffer's calls take it.
  Tensor input(const Tensor& tensor) const { return on_device(tensor, buffer_.device()); }

  void finish(const EventHandle& event, std::string stage, std::function<void()> check) {
    auto staged = [this, event, stage = std::move(stage), check = std::move(check)] {
      // On a GPU a call that has returned is only queued on the caller's stream.
      if (buffer_.device().type == DeviceType::kCuda) event.host_wait();
      checks_.stage(stage, event);
      check();
    };
    event_ = event;
    if (!case_.async) staged();
    if (case_.async || case_.hold_results) late_checks_.push_back(std::move(staged));
  }

  void find_layout();
  void prepare(DispatchArgs& args);
  BroughtOutputs bring_outputs(DispatchArgs& args) {
    return {buffer_, case_, args, inputs_.result_rows(), inputs_.grouped_rows()};
  }
  void dispatch();
  void dispatch_cached(int round);
  void combine(int round);

  Buffer& buffer_;
  const Case& case_;
  const Expected expected_;
  const CaseInputs inputs_;
  Checks checks_;
  EventHandle event_{};
  DispatchLayout layout_{};
  IntranodeHandle handle_{};
  InternodeHandle internode_handle_{};
  RowGroups groups_{};
  std::vector<std::function<void()>> late_checks_{};
};

void Run::find_layout() {
  const Tensor ids = input(inputs_.topk_idx());
  layout_ = buffer_.get_dispatch_layout(passed(ids), case_.experts, options());
  finish(layout_.event, "layout", [this, ids] { checks_.layout(on_host(layout_)); });
}

void Run::prepare(DispatchArgs& args) {
  if (!case_.prepare) return;
  args.prepared = buffer_.prepare_dispatch(args);
  checks_.stage("prepare", EventHandle());
  checks_.prepared(*args.prepared);
  if (case_.seed % 2 == 0) {  // they are known by now
    args.layout = {};
    args.num_experts = 0;
  }
}

void Run::dispatch() {
  const Tensor x = input(inputs_.x(0)), scales = input(inputs_.scales(0)),
               ids = input(inputs_.topk_idx()), stats = input(inputs_.stats());
  const Tensor weights = input(inputs_.topk_weights());
  DispatchArgs args;
  args.x = passed(x);
  args.x_scales = passed(scales);
  args.layout = layout_;
  args.layout.is_token_in_rank = passed(layout_.is_token_in_rank);
  if (case_.pass_topk) args.topk_idx = passed(ids);
  if (case_.pass_topk && case_.weights) args.topk_weights = passed(weights);
  if (case_.pass_topk && case_.seed % 3 == 0) {  // the call finds the layout itself
    args.layout = {};
    args.num_experts = case_.experts;
  }
  args.expert_alignment = case_.expert_alignment;
  args.num_worst_tokens = case_.num_worst_tokens == 0 ? 0 : inputs_.result_rows();
  args.config = case_.config;
  args.dispatch_wait_recv_cost_stats = stats;
  args.options = options();
  args.group_rows = case_.groups != Groups::kNone;
  prepare(args);
  const BroughtOutputs brought = bring_outputs(args);
  DispatchResult got = buffer_.dispatch(args);
  handle_ = got.handle;
  internode_handle_ = got.internode_handle;
  groups_ = got.groups;
  const EventHandle event = got.event;
  finish(event, "dispatch", [this, x, scales, ids, weights, stats, brought, got = std::move(got)] {
    brought.check(checks_.compare(), got);
    const DispatchResult here = on_host(got);
    checks_.first_dispatch(here);
    checks_.payload(here, 0);
    checks_.groups(here, 0, true);
    checks_.unchanged_x(on_host(x), 0);
    checks_.stats(on_host(stats));
  });
}

void Run::dispatch_cached(int round) {
  if (case_.clone_handle) event_.host_wait();
  const Tensor x = input(inputs_.x(round)), scales = input(inputs_.scales(round)),
               stats = input(inputs_.stats());
  DispatchArgs args;
  args.x = passed(x);
  args.x_scales = passed(scales);
  if (several_nodes()) {
    args.internode_handle = passed(internode_handle_);
  } else {
    args.handle = passed(handle_);
  }
  args.config = case_.late_config;
  args.dispatch_wait_recv_cost_stats = stats;
  args.options = options();
  args.group_rows = case_.groups != Groups::kNone;
  if (args.group_rows) args.groups = passed(groups_);
  const BroughtOutputs brought = bring_outputs(args);
  DispatchResult got = buffer_.dispatch(args);
  const EventHandle event = got.event;
  finish(event, fmt::format("cached dispatch {}", round),
         [this, x, scales, stats, handle = args.handle, other = args.internode_handle,
          groups = args.groups, round, brought, got = std::move(got)] {
           brought.check(checks_.compare(), got);
           const DispatchResult here = on_host(got);
           checks_.cached_dispatch(here);
           checks_.payload(here, round);
           checks_.groups(here, round, false);
           checks_.unchanged_x(on_host(x), round);
           checks_.stats(on_host(stats));
         });
}

void Run::combine(int round) {
  if (case_.clone_handle) event_.host_wait();
  const Tensor x = input(inputs_.combine_x(round)), weights = input(inputs_.combine_weights(round));
  const Tensor bias0 = case_.biases > 0 ? input(inputs_.bias(0, round)) : Tensor();
  const Tensor bias1 = case_.biases > 1 ? input(inputs_.bias(1, round)) : Tensor();
  const Tensor stats = input(inputs_.stats());
  CombineArgs args;
  args.x = passed(x);
  if (several_nodes()) {
    args.internode_handle = passed(internode_handle_);
  } else {
    args.handle = passed(handle_);
  }
  args.topk_weights = passed(weights);
  args.bias = {passed(bias0), passed(bias1)};
  args.config = case_.late_config;
  args.combine_wait_recv_cost_stats = stats;
  args.options = options();
  if (case_.groups != Groups::kNone) args.groups = passed(groups_);
  if (case_.groups == Groups::kUnweighted) args.groups->weights = {};
  CombineResult got = buffer_.combine(args);
  const EventHandle event = got.event;
  finish(event, fmt::format("combine {}", round),
         [this, x, weights, bias0, bias1, stats, handle = args.handle,
          other = args.internode_handle, groups = args.groups, round, got = std::move(got)] {
           checks_.combined(on_host(got), round);
           checks_.stats(on_host(stats));
         });
}

}  // namespace

std::string Case::describe() const {
  const auto flag = [](bool on, const char* text) { return on ? text : ""; };
  return fmt::format(
      "ranks={}{} tokens={} hidden={} dtype={} combine_dtype={} scales={} topk={} experts={} "
      "routing={} seed={} {} alignment={} worst={} cached={} combines={} biases={} sms={}/{} "
      "outputs={} groups={}{}{}{}{}{}{}{}",
      ranks, ranks_per_node > 0 ? fmt::format(" ranks_per_node={}", ranks_per_node) : "",
      fmt::join(tokens, ","), hidden, to_string(dtype), to_string(combine_dtype),
      static_cast<int>(scales), topk, experts, to_string(routing), seed, to_string(topk_dtype),
      expert_alignment, num_worst_tokens, cached_repeats, combines, biases, config.num_sms,
      late_config.num_sms, static_cast<int>(outputs), static_cast<int>(groups),
      flag(prepare, " prepared"), flag(!pass_topk, " no-topk"), flag(!weights, " no-weights"),
      flag(async, " async"), flag(clone_handle, " cloned-handle"),
      flag(hold_results, " held-results"), flag(wait_stats, " wait-stats"));
}

void CaseResult::merge(const CaseResult& other) {
  checked_elements += other.checked_elements;
  wrong_elements += other.wrong_elements;
  checked_outputs += other.checked_outputs;
  if (first_mismatch.empty()) first_mismatch = other.first_mismatch;
}

void validate(const Case& c) {
  require(c.ranks >= 1, "ranks = {} must be at least 1", c.ranks);
  require(c.tokens.size() == 1 || c.tokens.size() == static_cast<std::size_t>(c.ranks),
          "tokens has {} entries; allowed: 1 or one for each of the {} ranks", c.tokens.size(),
          c.ranks);
  require(c.ranks % c.node_size() == 0, "ranks_per_node = {} must divide the {} ranks",
          c.ranks_per_node, c.ranks);
  for (const std::int64_t tokens : c.tokens)
    require(tokens >= 0, "tokens = {} must not be negative", tokens);
  for (const DType dtype : {c.dtype, c.combine_dtype})
    require(c.hidden > 0 && c.hidden * static_cast<std::int64_t>(size_of(dtype)) % 16 == 0,
            "hidden = {} of {} must be a positive multiple of 16 bytes", c.hidden,
            to_string(dtype));
  require(c.combine_dtype == DType::kBfloat16 || c.combine_dtype == DType::kFloat16 ||
              c.combine_dtype == DType::kFloat32,
          "combine_dtype = {} must be bfloat16, float16 or float32", to_string(c.combine_dtype));
  require(c.experts > 0 && c.experts % c.ranks == 0,
          "experts = {} must be a positive multiple of ranks = {}", c.experts, c.ranks);
  require(c.topk >= 1, "topk = {} must be at least 1", c.topk);
  require(c.topk_dtype == DType::kInt64 || c.topk_dtype == DType::kInt32,
          "topk_dtype = {} must be int32 or int64", to_string(c.topk_dtype));
  require(c.biases >= 0 && c.biases <= 2, "biases = {} must be 0, 1 or 2", c.biases);
  require(c.num_worst_tokens == 0 || c.pass_topk, "num_worst_tokens = {} needs pass_topk",
          c.num_worst_tokens);
  require(!c.prepare || c.num_worst_tokens == 0, "num_worst_tokens = {} goes without prepare",
          c.num_worst_tokens);
  require(c.groups == Groups::kNone || c.pass_topk, "groups needs pass_topk");
  require(c.groups != Groups::kWeighted || c.weights, "weighted groups need weights");
}

CaseResult run_case(Buffer& buffer, const Case& c) {
  validate(c);
  require(c.ranks == buffer.num_ranks(), "the case is for {} ranks, the Buffer has {}", c.ranks,
          buffer.num_ranks());
  Run run(buffer, c);
  try {
    return run.go();
  } catch (...) {
    run.settle();
    throw;
  }
}

}  // namespace deep_ep::verify
