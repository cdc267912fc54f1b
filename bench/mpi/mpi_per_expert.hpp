#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "deep_ep/low_latency.hpp"
#include "mpi/mpi_exchange.hpp"
#include "verify/low_latency_case.hpp"

namespace deep_ep::bench {

/// The same as MpiLowLatency with a message for each token and expert, as DeepEP sends them: rows
/// arrive sorted by expert, and go home neither weighted nor summed.
class MpiPerExpert {
 public:
  MpiPerExpert(const verify::LowLatencyCase& c, int rank);

  void dispatch(const std::byte* x, const std::int64_t* topk_idx);
  void combine(const std::byte* y, const std::int64_t* topk_idx, const float* topk_weights);

  LowLatencyDispatchResult received() const { return received_; }
  Tensor combined() const { return combined_; }

 private:
  void count_rows(const std::int64_t* topk_idx);
  void exchange(const std::byte* from, std::byte* to, std::int64_t bytes, bool back) const;
  void unpack();

  verify::LowLatencyCase c_;
  int rank_;
  int local_experts_;
  std::int64_t rows_of_expert_;
  std::int64_t row_bytes_;      // e4m3 and scales
  std::int64_t message_bytes_;  // token, row
  std::int64_t home_bytes_;
  std::vector<int> sent_, got_;            // rows [E] by expert; [R, L] by source and local expert
  std::vector<std::int64_t> place_;        // [N, K] of the row among the sent ones, or -1
  std::vector<std::int64_t> first_place_;  // [E]
  HugeBuffer quantised_, out_, in_, home_out_, home_in_;
  LowLatencyDispatchResult received_;
  Tensor combined_;
};

/// An empty result of the shapes that a dispatch of FP8 with float32 scales gives.
LowLatencyDispatchResult make_low_latency_result(const verify::LowLatencyCase& c);

}  // namespace deep_ep::bench
