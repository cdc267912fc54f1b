#pragma once

#include <cstdint>
#include <vector>

#include "plan/reference_low_latency.hpp"
#include "verify/low_latency_case.hpp"

namespace deep_ep::verify {

/// How a case's rows look.
struct LowLatencyRows {
  explicit LowLatencyRows(const LowLatencyCase& c);

  DType x_dtype;     // of x
  DType recv_dtype;  // of recv_x
  bool use_fp8;      // as an argument
  bool round_scale;  // as arguments
  bool use_ue8m0;
  int num_scales = 0;  // of a received row
  DType scale_dtype = DType::kFloat32;
  bool scales_given = false;
  bool scales_by_column = false;
};

/// One row of the caller's x, and of its x_scales.
std::vector<std::byte> low_latency_x(const LowLatencyCase& c, int round, int rank,
                                     std::int64_t token);
std::vector<std::byte> low_latency_scales(const LowLatencyCase& c, int round, int rank,
                                          std::int64_t token);
/// Values [first, first + count) of the row that an expert puts out, for combine `round`.
void fill_expert_row(const LowLatencyCase& c, int round, int rank, std::int64_t row,
                     std::int64_t first, std::int64_t count, std::byte* out);

/// One dispatch: what all ranks pass and what they must receive. The rows that travel through the
/// reference are their own names.
struct LowLatencyExpected {
  LowLatencyExpected(const LowLatencyCase& c, int round);

  int round;
  std::vector<std::vector<std::int64_t>> topk_idx;            // [R], as the callers pass it
  std::vector<plan::reference::DispatchInput> inputs;         // [R], without masked ranks
  std::vector<plan::reference::LowLatencyReceived> received;  // [R]

  std::int64_t num_groups() const { return static_cast<std::int64_t>(received[0].groups.size()); }
};

/// A received row as the caller must find it.
plan::reference::QuantizedRow received_row(const LowLatencyCase& c, int round, int source,
                                           std::int64_t token);

/// combined_x of `rank` for combine `round` of a dispatch: [N, H] bfloat16.
std::vector<std::byte> expected_combine(const LowLatencyCase& c,
                                        const LowLatencyExpected& dispatched, int round, int rank);

}  // namespace deep_ep::verify
