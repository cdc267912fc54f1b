#pragma once

#include <cstdint>
#include <vector>

#include "plan/traffic.hpp"

namespace deep_ep::cli {

/// What moves bytes. GB/s are 10^9 bytes a second and rank, one way.
struct Machine {
  double local_gbps = 370;    ///< links inside a node
  double network_gbps = 45;   ///< a rank's share of the node's network
  double local_us = 1;        ///< one exchange of flags inside a node
  double network_us = 8;      ///< the same over the network
  double network_mrate = 20;  ///< million messages a second and rank
  double call_us = 11;        ///< of a call in which nothing moves, one rank
  // What a rank's own processors (SMs, cores) do meanwhile: rows written by a dispatch, rows read
  // and summed by a combine; high throughput and low latency have not the same ones.
  double write_gbps = 590;
  double sum_gbps = 480;
  double low_latency_call_us = 8.7;
  double low_latency_write_gbps = 1400;
  double low_latency_sum_gbps = 1850;
  std::int64_t chunk_rows = 16;  ///< rows in one message of high throughput
};

/// What a row is.
struct Payload {
  std::int64_t hidden = 7168;
  std::int64_t value_bytes = 2;  ///< of a value in dispatch
  std::int64_t scale_group = 0;  ///< values with one float32 scale; 0: no scales
  std::int64_t sum_bytes = 2;    ///< of a value in combine
  std::int64_t max_tokens = 0;   ///< M of low latency; 0: the tokens
};

enum class Operation {
  kNotify,    ///< counts among all ranks
  kDispatch,  ///< high throughput, counts known
  kCombine,
  kLowLatencyDispatch,  ///< one message for each (token, rank)
  kLowLatencyCombine,
  kPerExpertDispatch,  ///< low latency with one for each (token, expert), to compare with
  kPerExpertCombine,
};
const char* to_string(Operation operation);

/// One operation of one rank.
struct Prediction {
  Operation operation = Operation::kNotify;
  double row_bytes = 0;          ///< of one row or message, all that travels with it
  double network_row_bytes = 0;  ///< the same between nodes
  Load local_bytes;              ///< to or from ranks of its node
  Load network_bytes;
  double own_bytes = 0;       ///< do not leave the rank; mean
  double local_messages = 0;  ///< of the busiest rank
  double network_messages = 0;
  // Parts of the time, in us. The whole is their waits' sum plus the longest of what overlaps.
  double wait_us = 0;  ///< the call itself, exchanges, the first chunk's way
  double local_us = 0;
  double network_us = 0;  ///< by bytes or by messages, whichever takes longer
  double compute_us = 0;
  double total_us = 0;
  const char* bound = "";   ///< which of them is the longest
  double memory_bytes = 0;  ///< mapped buffers and results of the busiest rank
};

/// Notify, dispatch and combine; with several nodes rows are relayed.
std::vector<Prediction> predict_high_throughput(const Topology& topology, const Gate& gate,
                                                const Payload& payload, const Machine& machine,
                                                const Traffic& traffic);
/// Dispatch and combine with a message for each (token, rank), and for each (token, expert).
std::vector<Prediction> predict_low_latency(const Topology& topology, const Gate& gate,
                                            const Payload& payload, const Machine& machine,
                                            const Traffic& traffic);

}  // namespace deep_ep::cli
