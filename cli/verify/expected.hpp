#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "plan/reference.hpp"
#include "verify/case.hpp"

namespace deep_ep::verify {

/// The kinds of rows that a case makes up. A row's content follows from (seed, kind, round, rank,
/// index), see payload.hpp.
enum class Rows : std::uint64_t { kX, kScales, kCombine, kCombineWeights, kBias0, kBias1 };
std::uint64_t row_key(const Case& c, Rows kind, int round, int rank, std::int64_t index);

int num_scales(const Case& c);
DType scales_dtype(Scales scales);
std::int64_t num_worst_tokens(const Case& c);

/// One rank's routing as the caller would have it.
struct RankRouting {
  std::vector<std::int64_t> topk_idx;  // [N, K]
  std::vector<float> topk_weights;     // [N, K]
};

/// Where a received row comes from.
struct RowSource {
  std::int32_t rank;
  std::int32_t token;
};

/// A row of this rank's tokens at another rank.
struct RemoteRow {
  std::int64_t row;    // its index among the rows that the other rank received
  std::int32_t token;  // of this rank
};

/// Grouped rows at another rank that hold rows of this rank's tokens.
struct RemoteGroups {
  std::vector<std::int64_t> rows;       // their indices among the other rank's grouped rows
  std::vector<std::int32_t> recv_rows;  // of each: which RemoteRow
  std::vector<float> weights;
};

/// Beside that, with several nodes: what crosses over this rank.
struct InternodeExpected {
  std::vector<std::int32_t> num_tokens_per_rdma_rank;    // [nodes]
  std::vector<std::int32_t> send_rdma_head;              // [N, nodes]
  std::vector<std::vector<std::int32_t>> record_tokens;  // [nodes] of the records from each
  std::vector<std::int32_t> send_nvl_head;               // [M, ranks of a node]
  std::vector<std::uint64_t> row_masks;                  // [Nr]
};

/// What one rank must see, from plan/reference on the routing of all ranks. Rows of payload are not
/// stored: the reference moves their names, and fill_row makes their content.
struct Expected {
  int rank = 0;
  RankRouting own;
  std::vector<std::int32_t> num_tokens_per_rank;    // [R]
  std::vector<std::int32_t> num_tokens_per_expert;  // [E]
  std::vector<std::uint8_t> is_token_in_rank;       // [N, R]
  std::vector<std::int32_t> send_head;              // [N, R]
  plan::reference::DispatchOutput received;
  std::vector<RowSource> sources;              // [Nr]
  std::vector<std::vector<RemoteRow>> remote;  // [R]: the rows that combine must bring back
  InternodeExpected internode;                 // with several nodes
  plan::reference::RowGroups groups;           // if the case has groups, and
  std::vector<RemoteGroups> remote_groups;     // [R]
};

/// All ranks' routing as the case describes it.
std::vector<RankRouting> make_routings(const Case& c);
/// The case's shapes with any routing.
Expected make_expected(const Case& c, const std::vector<RankRouting>& routings, int rank);
/// Weights of a rank that go with a routing of any origin.
std::vector<float> make_topk_weights(const Case& c, int rank);

/// Columns [first, first + count) of this rank's combined_x in round `round`, and with `weights`
/// the combined weights.
plan::reference::CombineOutput expected_combine(const Case& c, const Expected& expected, int round,
                                                std::int64_t first, std::int64_t count,
                                                bool weights);

}  // namespace deep_ep::verify
