#include "wrong_calls.hpp"

#include <vector>

#include "verify/transfer.hpp"

namespace deep_ep::test {

void low_latency_dispatch_wrongly(Buffer& buffer, bool victim) {
  constexpr std::int64_t kTokens = 20;
  std::vector<std::int64_t> ids(kTokens, 0);
  if (victim) ids[7] = buffer.num_ranks();
  const std::vector<std::uint16_t> x(kTokens * 64, 0x3f80);
  const Tensor rows =
      verify::on_device(TensorView(x.data(), DType::kBfloat16, {kTokens, 64}), buffer.device());
  const Tensor topk_idx =
      verify::on_device(TensorView(ids.data(), DType::kInt64, {kTokens, 1}), buffer.device());
  LowLatencyDispatchArgs args;
  args.options.stream = verify::own_stream();
  args.x = rows;
  args.topk_idx = topk_idx;
  args.use_fp8 = false;
  args.num_max_dispatch_tokens_per_rank = kTokens;
  args.num_experts = buffer.num_ranks();
  buffer.low_latency_dispatch(args).event.host_wait();
}

void dispatch_wrongly(Buffer& buffer, const std::string& scenario, bool victim) {
  constexpr std::int64_t kTokens = 40;
  const int ranks = buffer.num_ranks();
  std::vector<std::int64_t> ids(kTokens * ranks);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int64_t>(i) % ranks;
  const std::vector<float> x(kTokens * 64, 1.5F);
  const auto on_gpu = [&](const void* data, DType dtype, std::int64_t columns) {
    return verify::on_device(TensorView(data, dtype, {kTokens, columns}), buffer.device());
  };
  DispatchArgs args;
  args.options.stream = verify::own_stream();
  const Tensor rows = on_gpu(x.data(), DType::kFloat32, 64);
  Tensor topk_idx = on_gpu(ids.data(), DType::kInt64, ranks);
  args.layout = buffer.get_dispatch_layout(topk_idx, ranks, args.options);
  if (victim && scenario == "expert_id") {
    ids[7] = ranks;
    topk_idx = on_gpu(ids.data(), DType::kInt64, ranks);
  }
  args.x = rows;
  args.topk_idx = topk_idx;
  if (victim && scenario == "refused") args.expert_alignment = 0;
  if (scenario == "capacity") args.num_worst_tokens = victim ? 5 : 400;
  buffer.dispatch(args).event.host_wait();
}

}  // namespace deep_ep::test
