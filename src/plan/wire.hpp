#pragma once

#include <cstdint>

#include "base/portable.hpp"

// How the rows of a low-latency combine look on their way home.
namespace deep_ep::plan {

enum class WireFormat : std::int32_t {
  kBfloat16,
  kLogFmt,  // LogFMT, ten bits a value: 164 bytes a group
  kFp8,     // e4m3 with a float32 scale: 132 bytes a group
};

/// Values that share a word of a row: a range (LogFmtRange) or a scale (float).
constexpr int kWireGroup = 128;

/// Where in a row of `hidden` values, whole groups, the parts are, in bytes. First comes a byte a
/// value: e4m3, or the lower eight bits of its code.
struct WireRow {
  std::int64_t high;   // LogFMT: the upper two bits of the codes, four values a byte
  std::int64_t words;  // a word a group
  std::int64_t bytes;  // of all, a multiple of 16

  /// Not of kBfloat16.
  DEEP_EP_HD static constexpr WireRow of(WireFormat format, std::int64_t hidden) {
    const std::int64_t words = format == WireFormat::kLogFmt ? hidden + hidden / 4 : hidden;
    return {hidden, words, (words + hidden / kWireGroup * 4 + 15) / 16 * 16};
  }
};

DEEP_EP_HD constexpr std::int64_t wire_row_bytes(WireFormat format, std::int64_t hidden) {
  return format == WireFormat::kBfloat16 ? 2 * hidden : WireRow::of(format, hidden).bytes;
}

}  // namespace deep_ep::plan
