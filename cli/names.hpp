#pragma once

#include <string_view>

#include "deep_ep/types.hpp"

namespace deep_ep::cli {

/// Short names of payload types: bf16, fp16, fp32, fp8, bytes. Throws Error(kInvalidArgument)
/// listing them.
DType dtype_from(std::string_view name);
const char* short_name(DType dtype);

/// What combine sums when dispatch moved rows of `dtype`: types that are not summed come back as
/// bfloat16.
DType combine_dtype_for(DType dtype);

/// What `--backend` may be.
constexpr const char* kBackends = "host or cuda";
/// The device of rank `rank` of this machine; ranks share GPUs when there are fewer. Throws
/// Error(kInvalidArgument), or kUnsupported without a GPU.
Device device_from(std::string_view backend, int rank);

}  // namespace deep_ep::cli
