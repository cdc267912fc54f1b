#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan/reference.hpp"
#include "plan/wire.hpp"

// Low latency as plain loops over a global view of all ranks, as plan/reference.hpp does it for the
// other modes: every test's oracle, which shares nothing with plan/low_latency or a backend.
namespace deep_ep::plan::reference {

struct LowLatencyShape {
  int num_topk = 0;
  int num_experts = 0;
  int num_ranks = 0;
  bool rank_major = false;
  WireFormat wire = WireFormat::kBfloat16;  // of a combine
  std::int64_t x_bytes = 0;
  std::int64_t scale_bytes = 0;
};

/// The rows of one local expert, or of one source if rank_major, in (source rank, token) order.
struct LowLatencyGroup {
  std::vector<std::byte> x;            // [rows, x_bytes]
  std::vector<std::byte> scales;       // [rows, scale_bytes]
  std::vector<std::int32_t> src_rank;  // [rows]
  std::vector<std::int32_t> src_idx;   // [rows]
  std::vector<std::int64_t> topk_idx;  // rank_major: [rows, K] local expert id or -1
  std::vector<float> topk_weights;     // rank_major, if given: [rows, K], 0 where the id is -1
};

/// What one rank receives.
struct LowLatencyReceived {
  std::vector<LowLatencyGroup> groups;  // [L], or [R] if rank_major
  /// Expert-major [L, R]: begin << 32 | count, of rows within the expert's. Rank-major [R]: begin
  /// is the source's first row of [R, M].
  std::vector<std::int64_t> layout_range;
};

/// `max_tokens`, M, is only needed for layout_range.
std::vector<LowLatencyReceived> low_latency_dispatch(const LowLatencyShape& shape,
                                                     std::int64_t max_tokens,
                                                     const std::vector<DispatchInput>& inputs);

/// How scales of a quantised row are written.
enum class LowLatencyScales {
  kFloat32,
  kPowerOfTwo,  // float32 that are powers of two
  kUe8m0,       // their exponent bytes, four in an int32, 0 behind the last
};
struct QuantizedRow {
  std::vector<std::byte> x;       // e4m3
  std::vector<std::byte> scales;  // 4-byte words
};
/// `row` holds bfloat16, a multiple of kFp8Group of them.
QuantizedRow quantize_row(const std::vector<std::byte>& row, LowLatencyScales scales);

/// One rank's part in a combine.
struct LowLatencyCombineInput {
  std::vector<std::int64_t> topk_idx;     // [N, K]
  std::vector<float> topk_weights;        // [N, K]; not used if rank_major
  std::vector<std::vector<std::byte>> x;  // by group: [rows, H] bfloat16
};

/// [N, H] bfloat16 of each rank. On each rank that has experts of a token, ascending: expert-major
/// acc = fma(w, x, acc) over its distinct experts, ascending, from +0, where w is the sum of the
/// entries that name the expert in the order of k; rounded to bfloat16. Rank-major the row as it
/// is. With another wire than bfloat16 the row is quantised then, and its values are what the codes
/// say, in fp32. Then acc = acc + row over the ranks, from +0, rounded to bfloat16.
std::vector<std::vector<std::byte>> low_latency_combine(
    const LowLatencyShape& shape, std::int64_t hidden,
    const std::vector<LowLatencyReceived>& received,
    const std::vector<LowLatencyCombineInput>& inputs);

}  // namespace deep_ep::plan::reference
