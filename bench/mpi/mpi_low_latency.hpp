#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "deep_ep/low_latency.hpp"
#include "mpi/mpi_exchange.hpp"
#include "verify/low_latency_case.hpp"

namespace deep_ep::bench {

/// What low_latency_dispatch and low_latency_combine do, over MPI_Alltoall and MPI_Alltoallv: one
/// message for each token and rank, rows quantised to FP8 on the way out, packed per expert there,
/// weighted and summed per rank before they go back. With the library's own arithmetic. All memory
/// is allocated once.
class MpiLowLatency {
 public:
  MpiLowLatency(const verify::LowLatencyCase& c, int rank);

  void dispatch(const std::byte* x, const std::int64_t* topk_idx);
  void combine(const std::byte* y, const std::int64_t* topk_idx, const float* topk_weights);

  /// As the library's results, for the checks.
  LowLatencyDispatchResult received() const;
  Tensor combined() const;

 private:
  void count_messages(const std::int64_t* topk_idx);
  void exchange(const std::byte* from, std::byte* to, std::int64_t bytes, bool back) const;
  void unpack();
  void send_weights(const std::int64_t* topk_idx, const float* topk_weights);
  void reduce(const std::byte* y);
  void sum();

  verify::LowLatencyCase c_;
  int rank_;
  int local_experts_;
  std::int64_t rows_of_expert_;
  std::int64_t row_bytes_;                       // e4m3 and scales
  std::int64_t message_bytes_;                   // token, local experts, row
  std::int64_t home_bytes_;                      // a row of bfloat16
  std::vector<int> sent_, got_;                  // messages by rank
  std::vector<std::int32_t> message_of_;         // [N, R]
  std::vector<std::int64_t> rows_;               // [messages, K] where a received row is, or -1
  std::vector<float> weights_out_, weights_in_;  // [messages, K]
  HugeBuffer out_, in_, home_out_, home_in_;
  LowLatencyDispatchResult received_;
  Tensor combined_;
};

}  // namespace deep_ep::bench
