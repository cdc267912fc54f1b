#include "deep_ep/config.hpp"

#include <algorithm>

#include "base/env.hpp"
#include "base/error.hpp"
#include "plan/internode.hpp"
#include "protocol/rail.hpp"

namespace deep_ep {

namespace {

constexpr std::int64_t align_up(std::int64_t bytes) { return (bytes + 127) / 128 * 128; }

// Room for a first few results before memory grows; a page or two of small batches, nothing of a
// large one.
constexpr std::int64_t kFirstResultsBytes = 32 << 20;
constexpr std::int64_t kControlBytes = 6 << 20;
constexpr std::int64_t kControlBytesPerRank = 96 << 10;

}  // namespace

void Config::validate() const {
  require(num_sms >= 1, "num_sms is {}, must be at least 1", num_sms);
  const auto check = [](const char* kind, int send, int recv) {
    require(send >= 1, "num_max_{}_chunked_send_tokens is {}, must be at least 1", kind, send);
    require(recv >= send,
            "num_max_{0}_chunked_recv_tokens is {1}, must be at least "
            "num_max_{0}_chunked_send_tokens, {2}",
            kind, recv, send);
  };
  check("nvl", num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens);
  check("rdma", num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens);
}

std::int64_t Config::get_nvl_buffer_size_hint(std::int64_t hidden_bytes,
                                              int num_ranks) const noexcept {
  const std::int64_t ranks = std::clamp(num_ranks, 1, 1 << 20);
  const std::int64_t hidden = std::clamp<std::int64_t>(hidden_bytes, 1, std::int64_t{1} << 30);
  // What callers of DeepEP V1 are used to give for this Config (8 peers a node at most, up to 128
  // experts a token and 128 scales a row): never more than that.
  const std::int64_t channels = std::clamp(num_sms / 2, 1, 1 << 12);
  const std::int64_t peers = std::min<std::int64_t>(ranks, 8);
  const std::int64_t nodes = std::max<std::int64_t>(ranks / 8, 1);
  const std::int64_t window = std::clamp(num_max_nvl_chunked_recv_tokens, 1, 1 << 16);
  const std::int64_t row = hidden + 8 + 128 * 8 + 128 * 4 + 128 * 4;
  const std::int64_t usual =
      channels * peers * (2 * nodes + 3) * 4 + channels * peers * window * row;
  const std::int64_t ours = kFirstResultsBytes + kControlBytes + kControlBytesPerRank * ranks;
  return align_up(std::min(usual, ours));
}

std::int64_t Config::get_rdma_buffer_size_hint(std::int64_t hidden_bytes,
                                               int num_ranks) const noexcept {
  int ranks_per_node = 8;
  try {
    if (const int given = env::ranks_per_node(); given > 0) ranks_per_node = given;
  } catch (const Error&) {  // a Buffer says so
  }
  ranks_per_node = std::min(ranks_per_node, plan::kMaxRanksPerNode);
  const int nodes = (std::clamp(num_ranks, 1, 1 << 20) + ranks_per_node - 1) / ranks_per_node;
  if (nodes == 1) return 0;
  // 128 experts a token and 128 scales a row at most, as DeepEP takes them.
  const plan::RecordFormat record(
      {.x_bytes = std::clamp<std::int64_t>(hidden_bytes, 1, std::int64_t{1} << 30),
       .scale_bytes = 128 * 4,
       .topk_idx_bytes = 128 * 8,
       .topk_weights_bytes = 128 * 4},
      ranks_per_node);
  const std::int64_t window = std::clamp(num_max_rdma_chunked_recv_tokens, 1, 1 << 16);
  protocol::RailShape shape{nodes * ranks_per_node, ranks_per_node, 1};
  shape.ring_bytes =
      std::max(align_up(window * record.bytes), protocol::RailBlock::kLeastRingBytes);
  return protocol::RailBlock::bytes(shape);
}

}  // namespace deep_ep
