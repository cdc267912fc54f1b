#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "deep_ep/deep_ep.hpp"
#include "plan/wire.hpp"
#include "verify/case.hpp"

// The same as verify/case.hpp for low latency: dispatches and combines on a Buffer, checked bitwise
// against plan/reference_low_latency.
namespace deep_ep::verify {

/// What travels in dispatch.
enum class LowLatencyPayload {
  kBfloat16,    ///< as it is
  kFp8,         ///< bfloat16, quantised on the way
  kFp8Rounded,  ///< the same with scales that are powers of two
  kFp8Ue8m0,    ///< the same as exponent bytes, packed
  kFloat16,     ///< as it is; also the next ones
  kFloat32,
  kBytes,
  kScaledFp8,     ///< e4m3 with float32 scales
  kScaledPacked,  ///< e4m3 with packed scales, column by column
};
const char* to_string(LowLatencyPayload payload);
/// Throws Error(kInvalidArgument) listing the names.
LowLatencyPayload low_latency_payload_from(std::string_view name);

/// How rows of a combine come home: bf16, logfmt or fp8.
const char* to_string(plan::WireFormat wire);
plan::WireFormat wire_from(std::string_view name);

/// Which calls have a recv_hook, and when it runs.
enum class Hooks {
  kNone,
  kEach,         ///< at once
  kTwoInOrder,   ///< two calls of a kind are sent, then received in the same order
  kTwoReversed,  ///< or in the other one
  kTwoByRank,    ///< or in an order that differs between ranks
  kCrossed,  ///< a dispatch and the combine of the one before are in flight together, received in
             ///< an order that differs between ranks
};
const char* to_string(Hooks hooks);
Hooks hooks_from(std::string_view name);

struct LowLatencyCase {
  static constexpr int kNobody = -1;

  std::string name{};
  int ranks = 1;
  int ranks_per_node = 0;                ///< of the Buffer; 0: all ranks are of one node
  std::vector<std::int64_t> tokens{16};  ///< N of each rank; one entry: the same on all
  std::int64_t max_tokens = 0;           ///< M; 0: the most tokens of any rank, at least 1
  std::int64_t hidden = 256;
  LowLatencyPayload payload = LowLatencyPayload::kFp8;
  int topk = 8;
  int experts = 32;
  Routing routing = Routing::kUniform;  ///< each dispatch draws its own
  std::uint64_t seed = 1;
  DType topk_dtype = DType::kInt64;
  bool rank_major = false;
  bool weights = true;  ///< rank-major: topk_weights in dispatch
  int dispatches = 2;
  int combines = 2;  ///< of the dispatches in turn, the last one first; each with new rows
  plan::WireFormat wire = plan::WireFormat::kBfloat16;
  Hooks hooks = Hooks::kNone;
  bool async = false;         ///< without hooks: async_finish, chained by previous_event
  bool zero_copy = false;     ///< combine reads the view of get_next_low_latency_combine_buffer
  bool own_outputs = false;   ///< results go where the caller says
  bool clone_handle = false;  ///< combine gets deep copies of the handle's tensors
  bool stats = false;         ///< pass all statistics
  int masked = kNobody;  ///< a rank that the others mask before the first call; it takes no part

  std::int64_t tokens_of(int rank) const {
    return tokens.size() == 1 ? tokens[0] : tokens[static_cast<std::size_t>(rank)];
  }
  std::int64_t capacity() const;
  /// num_rdma_bytes of a Buffer that can run the case.
  std::int64_t buffer_bytes() const;
  std::string describe() const;
};

/// Throws Error(kInvalidArgument) naming the field if no Buffer could run the case.
void validate(const LowLatencyCase& c);

/// Collective, as run_case(Buffer&, const Case&). The Buffer has at least buffer_bytes() for low
/// latency, and with a masked rank enable_shrink.
CaseResult run_case(Buffer& buffer, const LowLatencyCase& c);

}  // namespace deep_ep::verify
