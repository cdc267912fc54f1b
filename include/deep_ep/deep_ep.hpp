#pragma once

// Everything a program needs. No header of the library includes CUDA, NVSHMEM, UCX or torch.
#include "deep_ep/allocator.hpp"
#include "deep_ep/bootstrap.hpp"
#include "deep_ep/buffer.hpp"
#include "deep_ep/config.hpp"
#include "deep_ep/error.hpp"
#include "deep_ep/event.hpp"
#include "deep_ep/handle.hpp"
#include "deep_ep/low_latency.hpp"
#include "deep_ep/tensor.hpp"
#include "deep_ep/types.hpp"
#include "deep_ep/version.hpp"
