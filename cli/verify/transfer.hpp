#pragma once

#include "deep_ep/buffer.hpp"

// Inputs are made and outputs are checked on the host, whatever the Buffer's device.
namespace deep_ep::verify {

/// What the calling thread works on, on GPUs a stream of its own: Buffers that it uses beside those
/// of other threads must not be ordered by a stream that they share.
Stream own_stream();

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
