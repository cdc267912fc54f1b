#pragma once

#include <cstdint>

namespace deep_ep {

/// What is put, by all ranks at once: rank r to rank r + `distance`, counted around.
struct PutPlan {
  int num_sms = 0;  ///< blocks, one an SM; 0: as many as the GPU has
  int distance = 1;
};

/// What it took, the same on all ranks.
struct PutRate {
  int num_sms = 0;
  std::int64_t put_bytes = 0;      ///< of one put
  double bytes_per_second = 0;     ///< of a rank, median of the slowest ranks
  std::int64_t checked_words = 0;  ///< of all ranks, 8 bytes each
  std::int64_t wrong_words = 0;
};

}  // namespace deep_ep
