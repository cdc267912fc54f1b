#pragma once

#include "deep_ep/buffer.hpp"

// Inputs are made and outputs are checked on the host, whatever the Buffer's device.
namespace deep_ep::verify {

/// What the calling thread works on, on GPUs a stream of its own: Buffers that it uses beside those
/// of other threads must not be ordered by a stream that they share.
Stream own_stream();

/// The handle whose tensors are change(tensor) of those of `handle`.
template <class Change>
IntranodeHandle each_tensor(const IntranodeHandle& handle, Change&& change) {
  return {change(handle.rank_prefix_matrix),         change(handle.channel_prefix_matrix),
          change(handle.recv_channel_prefix_matrix), change(handle.recv_src_idx),
          change(handle.is_token_in_rank),           change(handle.send_head)};
}
template <class Change>
InternodeHandle each_tensor(const InternodeHandle& handle, Change&& change) {
  return {change(handle.is_token_in_rank),
          change(handle.rdma_channel_prefix_matrix),
          change(handle.gbl_channel_prefix_matrix),
          change(handle.recv_rdma_channel_prefix_matrix),
          change(handle.recv_rdma_rank_prefix_sum),
          change(handle.recv_gbl_channel_prefix_matrix),
          change(handle.recv_gbl_rank_prefix_sum),
          change(handle.recv_src_meta),
          change(handle.send_rdma_head),
          change(handle.send_nvl_head)};
}

/// `tensor` itself if it is there already.
Tensor on_device(const Tensor& tensor, Device device);
Tensor on_host(const Tensor& tensor);
IntranodeHandle on_host(const IntranodeHandle& handle);
InternodeHandle on_host(const InternodeHandle& handle);
DispatchLayout on_host(DispatchLayout layout);
DispatchResult on_host(DispatchResult result);
CombineResult on_host(CombineResult result);
LowLatencyDispatchResult on_host(LowLatencyDispatchResult result);

}  // namespace deep_ep::verify
