#pragma once

#include "backend/backend.hpp"

/// Low latency: one message for each (token, rank), through buffers of a fixed size. A Buffer call
/// is one step, or, with a hook, two: the same with Phases::kSend and with Phases::kReceive.
namespace deep_ep::internode_ll {

/// Throws Error(kCapacity) if calls of these shapes do not fit into `low_latency_bytes`.
void clean_low_latency_buffer(std::int64_t low_latency_bytes, const plan::LowLatencyShape& dispatch,
                              const plan::LowLatencyShape& combine);

/// Sends every token's row once to each rank that has one of its experts, and lays out what comes.
void dispatch(Backend& backend, const DispatchParams& params);

/// Sums each token's rows on the ranks of its experts, brings the sums home and adds them.
void combine(Backend& backend, const CombineParams& params);

}  // namespace deep_ep::internode_ll
