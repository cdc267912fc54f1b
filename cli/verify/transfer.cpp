#include "verify/transfer.hpp"

#include <cstdint>

namespace deep_ep::verify {

Stream own_stream() {
  constexpr std::uintptr_t kPerThread = 2;  // cudaStreamPerThread
  return {reinterpret_cast<void*>(kPerThread)};
}

Tensor on_device(const Tensor& tensor, Device device) {
  return !tensor.defined() || tensor.device == device ? tensor : tensor.to(device, own_stream());
}

Tensor on_host(const Tensor& tensor) { return on_device(tensor, {}); }

IntranodeHandle on_host(const IntranodeHandle& handle) {
  return each_tensor(handle, [](const Tensor& tensor) { return on_host(tensor); });
}

InternodeHandle on_host(const InternodeHandle& handle) {
  return each_tensor(handle, [](const Tensor& tensor) { return on_host(tensor); });
}

DispatchLayout on_host(DispatchLayout layout) {
  layout.num_tokens_per_rank = on_host(layout.num_tokens_per_rank);
  layout.num_tokens_per_expert = on_host(layout.num_tokens_per_expert);
  layout.is_token_in_rank = on_host(layout.is_token_in_rank);
  layout.num_tokens_per_rdma_rank = on_host(layout.num_tokens_per_rdma_rank);
  return layout;
}

DispatchResult on_host(DispatchResult result) {
  for (Tensor* tensor :
       {&result.recv_x, &result.recv_x_scales, &result.recv_topk_idx, &result.recv_topk_weights,
        &result.grouped_x, &result.grouped_x_scales, &result.groups.group_offsets,
        &result.groups.grouped_rows, &result.groups.recv_rows, &result.groups.weights})
    *tensor = on_host(*tensor);
  result.handle = on_host(result.handle);
  result.internode_handle = on_host(result.internode_handle);
  return result;
}

CombineResult on_host(CombineResult result) {
  result.combined_x = on_host(result.combined_x);
  result.combined_topk_weights = on_host(result.combined_topk_weights);
  return result;
}

LowLatencyDispatchResult on_host(LowLatencyDispatchResult result) {
  for (Tensor* tensor :
       {&result.recv_x, &result.recv_x_scales, &result.recv_count, &result.recv_topk_idx,
        &result.recv_topk_weights, &result.handle.src_info, &result.handle.layout_range})
    *tensor = on_host(*tensor);
  return result;
}

}  // namespace deep_ep::verify
