#pragma once

#include <string_view>
#include <vector>

#include "bench_rows.hpp"
#include "deep_ep/buffer.hpp"
#include "verify/low_latency_case.hpp"

namespace deep_ep::cli {

/// How calls are queued.
enum class BenchMode {
  kEager,  ///< one after the other; time of the host
  kGraph,  ///< GPUs: the chain is a CUDA graph whose results lie at one place; time of the GPU
};
const char* to_string(BenchMode mode);
BenchMode bench_mode_from(std::string_view name);

struct LowLatencyBenchSettings {
  int iterations = 20;
  int warmup = 3;
  /// Calls that follow each other without a barrier in one timed iteration.
  int chain = 100;
  bool check = true;
  bool on_comm_stream = false;  ///< GPUs: the caller works on the Buffer's own stream
};

/// Collective: dispatch, combine and pairs of them, each without and with hooks, on the rows and
/// the routing of `c`. All ranks get the same rows.
std::vector<BenchRow> bench_low_latency(Buffer& buffer, Bootstrap& bootstrap,
                                        const verify::LowLatencyCase& c,
                                        const LowLatencyBenchSettings& settings, BenchMode mode);

}  // namespace deep_ep::cli
