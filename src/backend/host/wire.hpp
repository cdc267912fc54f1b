#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/wire.hpp"

// The rows of a combine in formats other than bfloat16. Vectorised for the machine it runs on; the
// bits are those of plan/numerics.hpp, the bytes those of plan::WireRow.
namespace deep_ep::host {

/// `hidden` bfloat16, whole groups, to a row on its way.
void encode_row(plan::WireFormat format, const std::byte* row, std::int64_t hidden, std::byte* out);

/// Rows on their way, summed.
struct WireSum {
  plan::WireFormat format = plan::WireFormat::kLogFmt;
  std::int64_t hidden = 0;
  const std::byte* const* rows = nullptr;
  int num_rows = 0;
  std::byte* out = nullptr;  // [hidden] bfloat16
};
/// round(0 + row[0] + row[1] + ...), in fp32, in that order.
void sum_wire_rows(const WireSum& sum);

}  // namespace deep_ep::host
