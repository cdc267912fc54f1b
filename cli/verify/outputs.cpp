#include "verify/outputs.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "verify/transfer.hpp"

namespace deep_ep::verify {
namespace {

constexpr int kGuard = 0x5a;

}  // namespace

std::vector<BroughtOutputs::Output> BroughtOutputs::all() {
  return {
      {"recv_x", &DispatchArgs::recv_x, &DispatchResult::recv_x, {}},
      {"recv_x_scales", &DispatchArgs::recv_x_scales, &DispatchResult::recv_x_scales, {}},
      {"recv_topk_idx", &DispatchArgs::recv_topk_idx, &DispatchResult::recv_topk_idx, {}},
      {"recv_topk_weights",
       &DispatchArgs::recv_topk_weights,
       &DispatchResult::recv_topk_weights,
       {}},
      {"grouped_x", &DispatchArgs::grouped_x, &DispatchResult::grouped_x, {}},
      {"grouped_x_scales", &DispatchArgs::grouped_x_scales, &DispatchResult::grouped_x_scales, {}}};
}

BroughtOutputs::BroughtOutputs(Buffer& buffer, const Case& c, DispatchArgs& args, std::int64_t rows,
                               std::int64_t grouped_rows) {
  if (c.outputs == Outputs::kLibrary) return;
  const bool in_results =
      c.outputs == Outputs::kInResults || (c.outputs == Outputs::kMixed && buffer.rank() % 2 == 0);
  if (c.outputs != Outputs::kPrivate) {
    const DispatchResult other = buffer.dispatch(args);
    if (args.options.previous_event) args.options.previous_event = other.event;
    for (Output& output : outputs_ = all()) output.memory = other.*output.result;
  }
  if (!in_results) make_private(buffer.device(), args, rows, grouped_rows);
  for (const Output& output : outputs_) args.*output.argument = output.memory;
  // With num_worst_tokens its length is what there may be.
  if (args.grouped_x.defined()) args.grouped_x.shape[0] = grouped_rows;
}

void BroughtOutputs::make_private(Device device, const DispatchArgs& args, std::int64_t rows,
                                  std::int64_t grouped_rows) {
  guarded_ = true;
  outputs_ = all();
  const auto make = [&](std::size_t i, const TensorView& like, std::int64_t count) {
    if (!like.defined()) return;
    Tensor memory = Tensor::empty(like.dtype, {count + 1, like.shape[1]});
    std::memset(memory.data, kGuard, memory.nbytes());
    outputs_[i].memory = on_device(memory, device);
  };
  make(0, args.x, rows);
  make(1, args.x_scales, rows);
  make(2, args.topk_idx, rows);
  make(3, args.topk_weights, rows);
  if (!args.group_rows) return;
  make(4, args.x, grouped_rows);
  make(5, args.x_scales, grouped_rows);
}

void BroughtOutputs::check(Comparator& compare, const DispatchResult& got) const {
  for (const Output& output : outputs_) {
    if (!output.memory.defined()) continue;
    const Tensor& result = got.*output.result;
    compare.expect(result.data == output.memory.data,
                   fmt::format("{} lies in the memory that was given for it", output.name));
    if (!guarded_) continue;
    const Tensor memory = on_host(output.memory);
    const std::size_t begin = result.nbytes();
    const auto* bytes = memory.as<const std::byte>();
    compare.expect(std::all_of(bytes + begin, bytes + memory.nbytes(),
                               [](std::byte byte) { return byte == std::byte{kGuard}; }),
                   fmt::format("nothing is written behind {}", output.name));
  }
}

}  // namespace deep_ep::verify
