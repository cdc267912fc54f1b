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

}  // namespace deep_ep::cli
