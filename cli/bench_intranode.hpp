#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bench_rows.hpp"
#include "deep_ep/buffer.hpp"
#include "topk_file.hpp"
#include "verify/case.hpp"
#include "verify/routing.hpp"

namespace deep_ep::cli {

/// One row of a sweep.
struct BenchShape {
  std::int64_t tokens = 4096;
  std::int64_t hidden = 7168;
  int topk = 8;
  int experts = 256;
  DType dtype = DType::kBfloat16;
  int num_sms = 20;
};

/// What all rows of a sweep share.
struct BenchSettings {
  verify::Routing routing = verify::Routing::kUniform;
  std::optional<TopkTable> table{};  ///< recorded ids instead of `routing`
  double skew = 1.0;
  std::uint64_t seed = 1;
  int iterations = 20;
  int warmup = 5;
  bool check = true;
  int live_results = 1;
  /// Calls of an operation that follow each other in one timed iteration. On GPUs, where calls are
  /// only queued, the end of the last one is waited for.
  int chain = 1;
  bool pair_latency = false;
  bool graph = false;           ///< GPUs: also chains as a CUDA graph
  bool on_comm_stream = false;  ///< GPUs: the caller works on the Buffer's own stream
  Config config{};
  int ranks_per_node = 0;  ///< 0: all ranks are of one node
};

/// The exchange that a shape stands for, as the checks describe it.
verify::Case make_bench_case(const BenchShape& shape, const BenchSettings& settings, int ranks);

/// Collective: all operations at `shape`, whatever nodes the Buffer has. All ranks get the same
/// rows.
std::vector<BenchRow> bench_intranode(Buffer& buffer, Bootstrap& bootstrap, const BenchShape& shape,
                                      const BenchSettings& settings);

}  // namespace deep_ep::cli
