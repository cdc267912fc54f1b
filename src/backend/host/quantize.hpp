#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/params.hpp"

namespace deep_ep::host {

/// `hidden` bfloat16, a multiple of plan::kFp8Group, to e4m3 and the words of their scales, as
/// plan/numerics.hpp says. Not with Quantization::kNone.
void quantize_row(const std::byte* row, std::int64_t hidden,
                  deep_ep::internode_ll::Quantization quantization, std::byte* out,
                  std::byte* scales);

}  // namespace deep_ep::host
