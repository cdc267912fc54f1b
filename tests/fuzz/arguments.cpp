#include "fuzz/arguments.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <vector>

namespace deep_ep::test {
namespace {

constexpr std::int64_t kTokens = 6;
constexpr std::int64_t kHidden = 32;
constexpr int kTopk = 3;
constexpr int kExperts = 4;
constexpr std::int64_t kArenaBytes = 1 << 20;

/// Bytes that any view of the fuzzer lies in. Ones everywhere, which is a value of every dtype.
class Arena {
 public:
  Arena() : bytes_(kArenaBytes, std::byte{1}) {}
  void* data() { return bytes_.data(); }

  /// True if every element that `view` names lies inside.
  bool holds(const TensorView& view) const {
    __extension__ using Wide = __int128;
    Wide last = 0;
    for (int i = 0; i < std::min(view.ndim, TensorView::kMaxDims); ++i) {
      if (view.shape[static_cast<std::size_t>(i)] <= 0) return true;
      const Wide stride = view.strides[static_cast<std::size_t>(i)];
      if (stride < 0) return false;
      last += stride * (view.shape[static_cast<std::size_t>(i)] - 1);
    }
    return (last + 1) * static_cast<Wide>(size_of(view.dtype)) <= kArenaBytes;
  }

 private:
  std::vector<std::byte> bytes_;
};

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  std::uint64_t below(std::uint64_t end) { return random_() % end; }
  bool chance(int one_in) { return below(static_cast<std::uint64_t>(one_in)) == 0; }

  /// Changes something about `view`, but never so that it names memory that is not there.
  void change(TensorView& view) {
    const TensorView before = view;
    change_once(view);
    if (view.data != nullptr && !arena_.holds(view)) view = before;
  }

  /// A view with memory of its own in place of a result's, so that its content can be anything.
  void scramble(Tensor& tensor) {
    if (tensor.owner() == nullptr || tensor.nbytes() == 0) return;
    const Tensor copy = Tensor::empty(tensor.dtype, {tensor.numel()});
    std::memcpy(copy.data, tensor.data, tensor.nbytes());
    auto* bytes = copy.as<std::uint8_t>();
    if (tensor.dtype == DType::kInt32) {
      constexpr std::array<std::int32_t, 7> kValues{-1, 0, 1, 5, 1000, INT32_MAX, INT32_MIN};
      copy.as<std::int32_t>()[below(static_cast<std::uint64_t>(tensor.numel()))] =
          kValues[below(kValues.size())];
    } else {
      bytes[below(tensor.nbytes())] = static_cast<std::uint8_t>(below(2));
    }
    TensorView view = tensor;
    view.data = copy.data;
    tensor = Tensor(view, copy.owner());
  }

  int small_int() {
    constexpr std::array kValues{-1, 0, 1, 2, 3, 8, 24, 100, INT32_MAX, INT32_MIN};
    return kValues[below(kValues.size())];
  }

  Arena& arena() { return arena_; }

 private:
  void change_once(TensorView& view) {
    constexpr std::array<std::int64_t, 13> kSizes{-1,
                                                  0,
                                                  1,
                                                  2,
                                                  3,
                                                  4,
                                                  kTokens,
                                                  kTokens + 1,
                                                  kHidden,
                                                  2 * kHidden,
                                                  65,
                                                  std::int64_t{1} << 31,
                                                  std::int64_t{1} << 62};
    switch (below(7)) {
      case 0:
        view = {};
        break;
      case 1:
        view.dtype = static_cast<DType>(below(8));
        break;
      case 2: {
        const auto dim = below(2);
        view.shape[dim] = kSizes[below(kSizes.size())];
        if (view.ndim == 2) view.strides = {view.shape[1], 1};
        break;
      }
      case 3:
        view.strides[below(2)] = kSizes[below(kSizes.size())];
        break;
      case 4:
        view.ndim = static_cast<int>(below(9)) - 1;
        break;
      case 5:
        view.data = nullptr;
        break;
      default:
        view.device = {DeviceType::kCuda, static_cast<int>(below(3))};
    }
  }

  std::mt19937_64 random_;
  Arena arena_;
};

/// Valid arguments in memory that lives as long as this.
struct Valid {
  std::vector<std::int64_t> topk_idx;
  DispatchArgs dispatch;

  Valid(Buffer& buffer, Mutator& mutator) {
    for (std::int64_t i = 0; i < kTokens * kTopk; ++i)
      topk_idx.push_back(static_cast<std::int64_t>(mutator.below(kExperts + 1)) - 1);
    dispatch.x = {mutator.arena().data(), DType::kFloat32, {kTokens, kHidden}};
    dispatch.topk_idx = {topk_idx.data(), DType::kInt64, {kTokens, kTopk}};
    dispatch.layout = buffer.get_dispatch_layout(dispatch.topk_idx, kExperts);
    dispatch.topk_weights = {mutator.arena().data(), DType::kFloat32, {kTokens, kTopk}};
  }
};

void change_config(Mutator& mutator, Config& config) {
  constexpr std::array kFields{&Config::num_sms, &Config::num_max_nvl_chunked_send_tokens,
                               &Config::num_max_nvl_chunked_recv_tokens,
                               &Config::num_max_rdma_chunked_send_tokens,
                               &Config::num_max_rdma_chunked_recv_tokens};
  config.*kFields[mutator.below(kFields.size())] = mutator.small_int();
}

/// One of the tensors of a handle: its numbers, or what it says of itself.
template <std::size_t kCount>
void change_one(Mutator& mutator, const std::array<Tensor*, kCount>& tensors) {
  Tensor& tensor = *tensors[mutator.below(tensors.size())];
  if (mutator.chance(2)) {
    mutator.scramble(tensor);
    return;
  }
  TensorView view = tensor;
  view.data = mutator.arena().data();
  mutator.change(view);
  tensor = view;
}

void change_handle(Mutator& mutator, IntranodeHandle& handle) {
  const std::array<Tensor*, 6> tensors{
      &handle.rank_prefix_matrix, &handle.channel_prefix_matrix, &handle.recv_channel_prefix_matrix,
      &handle.recv_src_idx,       &handle.is_token_in_rank,      &handle.send_head};
  change_one(mutator, tensors);
}

void change_options(Mutator& mutator, CallOptions& options) {
  options.async_finish = mutator.chance(2);
  options.allocate_on_comm_stream = mutator.chance(2);
  if (mutator.chance(2)) options.previous_event = EventHandle();
}

void change_dispatch(Mutator& mutator, DispatchArgs& args) {
  const auto change_tensor = [&](Tensor& tensor) {
    if (mutator.chance(2)) {
      mutator.scramble(tensor);
      return;
    }
    TensorView view = tensor;
    view.data = mutator.arena().data();
    mutator.change(view);
    tensor = view;
  };
  switch (mutator.below(11)) {
    case 0:
      return mutator.change(args.x);
    case 1:
      args.x_scales = {mutator.arena().data(), DType::kFloat32, {kTokens, 2}};
      return mutator.change(args.x_scales);
    case 2:
      return change_tensor(args.layout.num_tokens_per_rank);
    case 3:
      return change_tensor(args.layout.num_tokens_per_expert);
    case 4:
      return change_tensor(args.layout.is_token_in_rank);
    case 5:
      args.topk_idx.data = mutator.arena().data();  // ids far too large
      return mutator.change(args.topk_idx);
    case 6:
      return mutator.change(args.topk_weights);
    case 7:
      args.expert_alignment = mutator.small_int();
      return;
    case 8:
      args.num_worst_tokens = mutator.small_int() % 1000;
      return;
    case 9:
      args.dispatch_wait_recv_cost_stats = {mutator.arena().data(), DType::kInt64, {1}};
      return mutator.change(args.dispatch_wait_recv_cost_stats);
    default:
      change_config(mutator, args.config);
      return change_options(mutator, args.options);
  }
}

void change_groups(Mutator& mutator, RowGroups& groups) {
  const std::array<Tensor*, 4> tensors{&groups.group_offsets, &groups.grouped_rows,
                                       &groups.recv_rows, &groups.weights};
  change_one(mutator, tensors);
}

/// Outputs, groups or counts that do not fit. Outputs have memory of their own, which is written.
void change_extras(Mutator& mutator, DispatchArgs& args, const Tensor& memory) {
  args.group_rows = mutator.chance(2);
  constexpr std::array kOutputs{&DispatchArgs::recv_x,        &DispatchArgs::recv_x_scales,
                                &DispatchArgs::recv_topk_idx, &DispatchArgs::recv_topk_weights,
                                &DispatchArgs::grouped_x,     &DispatchArgs::grouped_x_scales};
  TensorView& output = args.*kOutputs[mutator.below(kOutputs.size())];
  output = {memory.data, DType::kFloat32, {4 * kTokens, kHidden}};
  if (mutator.chance(2)) mutator.change(output);
  if (args.prepared && mutator.chance(2)) {
    args.prepared->num_recv_tokens = mutator.small_int() % 1000;
    args.prepared->num_experts = mutator.small_int() % 1000;
  }
  if (args.prepared && mutator.chance(4)) change_handle(mutator, args.prepared->handle);
}

void change_combine(Mutator& mutator, CombineArgs& args) {
  switch (mutator.below(5)) {
    case 0:
      return mutator.change(args.x);
    case 1:
      args.topk_weights = {mutator.arena().data(), DType::kFloat32, {args.x.shape[0], kTopk}};
      return mutator.change(args.topk_weights);
    case 2:
      args.bias[mutator.below(2)] = {mutator.arena().data(), DType::kFloat32, {kTokens, kHidden}};
      return mutator.change(args.bias[mutator.below(2)]);
    case 3:
      return change_handle(mutator, args.handle);
    default:
      change_config(mutator, args.config);
      return change_options(mutator, args.options);
  }
}

void call_layout(Mutator& mutator, Buffer& buffer, Valid& valid) {
  TensorView topk_idx = valid.dispatch.topk_idx;
  int experts = kExperts;
  if (mutator.chance(2)) topk_idx.data = mutator.arena().data();
  if (mutator.chance(2)) mutator.change(topk_idx);
  if (mutator.chance(2)) experts = std::min(mutator.small_int(), 1 << 20);
  CallOptions options;
  if (mutator.chance(4)) change_options(mutator, options);
  buffer.get_dispatch_layout(topk_idx, experts, options).event.host_wait();
}

void call_combine(Mutator& mutator, Buffer& buffer, const DispatchResult& dispatched) {
  CombineArgs args;
  args.x = {mutator.arena().data(), DType::kFloat32, {dispatched.num_recv_tokens, kHidden}};
  args.handle = dispatched.handle;
  for (std::uint64_t i = 0; i <= mutator.below(2); ++i) change_combine(mutator, args);
  buffer.combine(args).event.host_wait();
}

/// Rows by expert there and back, prepared or not.
void call_grouped(Mutator& mutator, Buffer& buffer, const Valid& valid) {
  DispatchArgs args = valid.dispatch;
  args.group_rows = true;
  args.expert_alignment = 1 + static_cast<int>(mutator.below(5));
  if (mutator.chance(2)) args.prepared = buffer.prepare_dispatch(args);
  const Tensor memory = Tensor::empty(DType::kUint8, {kArenaBytes});
  if (mutator.chance(2)) {
    change_extras(mutator, args, memory);
    return buffer.dispatch(args).event.host_wait();
  }
  const DispatchResult got = buffer.dispatch(args);
  if (mutator.chance(2)) {
    DispatchArgs cached;
    cached.x = args.x;
    cached.handle = got.handle;
    cached.group_rows = true;
    cached.groups = got.groups;
    change_groups(mutator, *cached.groups);
    return buffer.dispatch(cached).event.host_wait();
  }
  CombineArgs back;
  back.x = got.grouped_x;
  back.handle = got.handle;
  back.groups = got.groups;
  change_groups(mutator, *back.groups);
  if (mutator.chance(4)) back.x.data = mutator.arena().data();
  if (back.x.data == mutator.arena().data()) mutator.change(back.x);
  buffer.combine(back).event.host_wait();
}

void call(Mutator& mutator, Buffer& buffer, Valid& valid) {
  switch (mutator.below(5)) {
    case 0:
      return call_layout(mutator, buffer, valid);
    case 1: {
      DispatchArgs args = valid.dispatch;
      for (std::uint64_t i = 0; i <= mutator.below(2); ++i) change_dispatch(mutator, args);
      return buffer.dispatch(args).event.host_wait();
    }
    case 2: {
      DispatchArgs args;
      args.x = valid.dispatch.x;
      args.handle = buffer.dispatch(valid.dispatch).handle;
      if (mutator.chance(2)) change_handle(mutator, *args.handle);
      if (mutator.chance(2)) change_dispatch(mutator, args);
      return buffer.dispatch(args).event.host_wait();
    }
    case 3:
      return call_grouped(mutator, buffer, valid);
    default:
      return call_combine(mutator, buffer, buffer.dispatch(valid.dispatch));
  }
}

}  // namespace

std::string ArgumentFuzzer::run(Worker& worker, std::uint64_t seed) {
  if (buffer_ == nullptr) {
    BufferOptions options;
    options.timeout = std::chrono::seconds(10);
    options.num_threads = 1;
    buffer_ = std::make_unique<Buffer>(worker.bootstrap(), options);
  }
  Mutator mutator(seed);
  Valid valid(*buffer_, mutator);
  try {
    call(mutator, *buffer_, valid);
    ++accepted_;
  } catch (const Error& error) {
    ++refused_;
    return check_fault(error);
  }
  return check_still_right();
}

std::string ArgumentFuzzer::check_fault(const Error& error) {
  if (std::strlen(error.what()) < 10) return fmt::format("the Error says '{}'", error.what());
  const bool timed_out = error.code() == ErrorCode::kTimeout;
  if (timed_out) return fmt::format("not refused, but timed out: {}", error.what());
  try {
    buffer_->check();
  } catch (const Error& fault) {
    buffer_.reset();
    return fault.code() == error.code()
               ? ""
               : fmt::format("'{}' became '{}'", error.what(), fault.what());
  }
  return check_still_right();
}

/// A Buffer without fault works as if nothing had been.
std::string ArgumentFuzzer::check_still_right() {
  std::vector<float> x(kTokens * kHidden);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i + 1);
  const std::vector<std::int32_t> topk_idx(kTokens, 0);
  DispatchArgs args;
  args.x = {x.data(), DType::kFloat32, {kTokens, kHidden}};
  args.topk_idx = {topk_idx.data(), DType::kInt32, {kTokens, 1}};
  args.layout = buffer_->get_dispatch_layout(args.topk_idx, 1);
  const DispatchResult dispatched = buffer_->dispatch(args);
  CombineArgs back;
  back.x = dispatched.recv_x;
  back.handle = dispatched.handle;
  const CombineResult combined = buffer_->combine(back);
  if (dispatched.num_recv_tokens != kTokens) return "afterwards rows are missing";
  if (std::memcmp(combined.combined_x.data, x.data(), x.size() * sizeof(float)) != 0)
    return "afterwards results are wrong";
  return "";
}

}  // namespace deep_ep::test
