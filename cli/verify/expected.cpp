#include "verify/expected.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "base/error.hpp"
#include "verify/payload.hpp"
#include "verify/random.hpp"

namespace deep_ep::verify {
namespace {

// The rows that travel through the reference are their own names.
std::vector<std::byte> name_rows(int rank, std::int64_t tokens) {
  std::vector<std::byte> names(static_cast<std::size_t>(tokens) * sizeof(RowSource));
  for (std::int64_t token = 0; token < tokens; ++token) {
    const RowSource name{rank, static_cast<std::int32_t>(token)};
    std::memcpy(names.data() + static_cast<std::size_t>(token) * sizeof name, &name, sizeof name);
  }
  return names;
}

void count_layout(const Case& c, Expected& expected) {
  const auto ranks = static_cast<std::size_t>(c.ranks);
  const auto tokens = static_cast<std::size_t>(c.tokens_of(expected.rank));
  const auto topk = static_cast<std::size_t>(c.topk);
  expected.num_tokens_per_rank.assign(ranks, 0);
  expected.num_tokens_per_expert.assign(static_cast<std::size_t>(c.experts), 0);
  expected.is_token_in_rank.assign(tokens * ranks, 0);
  expected.send_head.assign(tokens * ranks, -1);
  for (std::size_t token = 0; token < tokens; ++token) {
    std::set<std::size_t> targets;
    for (std::size_t k = 0; k < topk; ++k) {
      const std::int64_t expert = expected.own.topk_idx[token * topk + k];
      if (expert < 0) continue;
      ++expected.num_tokens_per_expert[static_cast<std::size_t>(expert)];
      targets.insert(static_cast<std::size_t>(expert / (c.experts / c.ranks)));
    }
    for (const std::size_t target : targets) {
      expected.is_token_in_rank[token * ranks + target] = 1;
      expected.send_head[token * ranks + target] = expected.num_tokens_per_rank[target]++;
    }
  }
}

RemoteGroups remote_groups(const plan::reference::RowGroups& groups,
                           const std::vector<RemoteRow>& remote) {
  RemoteGroups found;
  std::map<std::int64_t, std::int32_t> index;
  for (const RemoteRow& row : remote)
    index.emplace(row.row, static_cast<std::int32_t>(index.size()));
  for (std::size_t g = 0; g < groups.recv_rows.size(); ++g) {
    const auto at = index.find(groups.recv_rows[g]);
    if (at == index.end()) continue;
    found.rows.push_back(static_cast<std::int64_t>(g));
    found.recv_rows.push_back(at->second);
    found.weights.push_back(groups.weights[g]);
  }
  return found;
}

void find_groups(const Case& c, const std::vector<plan::reference::DispatchOutput>& outputs,
                 Expected& expected) {
  for (std::size_t rank = 0; rank < outputs.size(); ++rank) {
    auto groups =
        plan::reference::group_rows(outputs[rank], c.topk, c.experts / c.ranks, c.expert_alignment);
    expected.remote_groups.push_back(remote_groups(groups, expected.remote[rank]));
    if (static_cast<int>(rank) == expected.rank) expected.groups = std::move(groups);
  }
}

/// Bit i: the token has an expert on the rank of index i of the node.
std::uint64_t mask_at(const Case& c, const RankRouting& routing, std::int64_t token, int node) {
  std::uint64_t mask = 0;
  for (int k = 0; k < c.topk; ++k) {
    const std::int64_t expert = routing.topk_idx[static_cast<std::size_t>(token * c.topk + k)];
    if (expert < 0) continue;
    const std::int64_t rank = expert / (c.experts / c.ranks);
    if (rank / c.node_size() == node) mask |= std::uint64_t{1} << (rank % c.node_size());
  }
  return mask;
}

void find_records(const Case& c, const std::vector<RankRouting>& routings, Expected& expected) {
  const int nodes = c.ranks / c.node_size();
  const int own_node = expected.rank / c.node_size();
  InternodeExpected& internode = expected.internode;
  internode.num_tokens_per_rdma_rank.assign(static_cast<std::size_t>(nodes), 0);
  for (std::int64_t token = 0; token < c.tokens_of(expected.rank); ++token)
    for (int node = 0; node < nodes; ++node) {
      std::int32_t& count = internode.num_tokens_per_rdma_rank[static_cast<std::size_t>(node)];
      internode.send_rdma_head.push_back(mask_at(c, expected.own, token, node) != 0 ? count++ : -1);
    }
  for (int node = 0; node < nodes; ++node) {
    const int source = node * c.node_size() + expected.rank % c.node_size();
    auto& tokens = internode.record_tokens.emplace_back();
    std::vector<std::int32_t> next(static_cast<std::size_t>(c.node_size()), 0);
    for (std::int64_t token = 0; token < c.tokens_of(source); ++token) {
      const std::uint64_t mask =
          mask_at(c, routings[static_cast<std::size_t>(source)], token, own_node);
      if (mask == 0) continue;
      tokens.push_back(static_cast<std::int32_t>(token));
      for (std::size_t i = 0; i < next.size(); ++i)
        internode.send_nvl_head.push_back((mask >> i & 1) != 0 ? next[i]++ : -1);
    }
  }
  for (const RowSource& row : expected.sources)
    internode.row_masks.push_back(
        mask_at(c, routings[static_cast<std::size_t>(row.rank)], row.token, own_node));
}

/// What the rows of combine at `target` that are this rank's hold in columns [first, first +
/// count).
std::vector<std::byte> reduced_rows(const Case& c, const Expected& expected, std::size_t target,
                                    int round, std::int64_t first, std::int64_t count) {
  const RemoteGroups& groups = expected.remote_groups[target];
  const auto row_bytes = static_cast<std::size_t>(count) * size_of(c.combine_dtype);
  plan::reference::GroupedInput input;
  input.recv_rows = groups.recv_rows;
  if (c.groups == Groups::kWeighted) input.weights = groups.weights;
  input.x.resize(groups.rows.size() * row_bytes);
  for (std::size_t i = 0; i < groups.rows.size(); ++i)
    fill_row(row_key(c, Rows::kCombine, round, static_cast<int>(target), groups.rows[i]),
             c.combine_dtype, first, count, input.x.data() + i * row_bytes);
  return plan::reference::reduce_rows(
      c.combine_dtype, count, static_cast<std::int64_t>(expected.remote[target].size()), input);
}

}  // namespace

std::uint64_t row_key(const Case& c, Rows kind, int round, int rank, std::int64_t index) {
  return make_key(c.seed, kind, round, rank, index);
}

int num_scales(const Case& c) {
  if (c.scales == Scales::kNone) return 0;
  return c.num_scales > 0 ? c.num_scales : static_cast<int>((c.hidden + 127) / 128);
}

DType scales_dtype(Scales scales) {
  return scales == Scales::kPacked || scales == Scales::kPackedColumnMajor ? DType::kInt32
                                                                           : DType::kFloat32;
}

std::int64_t num_worst_tokens(const Case& c) {
  if (c.num_worst_tokens != Case::kWorstFits) return c.num_worst_tokens;
  std::int64_t sum = 0;
  for (int rank = 0; rank < c.ranks; ++rank) sum += c.tokens_of(rank);
  return std::max<std::int64_t>(sum, 1);
}

std::vector<float> make_topk_weights(const Case& c, int rank) {
  std::vector<float> weights(static_cast<std::size_t>(c.tokens_of(rank) * c.topk));
  fill_weights(make_key(c.seed, 0x77656967, rank), static_cast<std::int64_t>(weights.size()),
               weights.data());
  return weights;
}

std::vector<RankRouting> make_routings(const Case& c) {
  std::vector<RankRouting> routings;
  RoutingSpec spec;
  spec.routing = c.routing;
  spec.topk = c.topk;
  spec.experts = c.experts;
  spec.ranks = c.ranks;
  spec.seed = c.seed;
  for (spec.rank = 0; spec.rank < c.ranks; ++spec.rank) {
    spec.tokens = c.tokens_of(spec.rank);
    routings.push_back({make_routing(spec), make_topk_weights(c, spec.rank)});
  }
  return routings;
}

Expected make_expected(const Case& c, const std::vector<RankRouting>& routings, int rank) {
  Expected expected;
  expected.rank = rank;
  expected.own = routings[static_cast<std::size_t>(rank)];
  std::vector<plan::reference::DispatchInput> inputs(static_cast<std::size_t>(c.ranks));
  for (int source = 0; source < c.ranks; ++source) {
    auto& input = inputs[static_cast<std::size_t>(source)];
    input.num_tokens = c.tokens_of(source);
    input.x = name_rows(source, input.num_tokens);
    input.topk_idx = routings[static_cast<std::size_t>(source)].topk_idx;
    input.topk_weights = routings[static_cast<std::size_t>(source)].topk_weights;
  }
  plan::reference::DispatchShape shape;
  shape.num_topk = c.topk;
  shape.num_experts = c.experts;
  shape.num_ranks = c.ranks;
  shape.x_bytes = sizeof(RowSource);
  shape.expert_alignment = c.expert_alignment;
  auto outputs = plan::reference::dispatch(shape, inputs);

  expected.remote.resize(outputs.size());
  for (std::size_t target = 0; target < outputs.size(); ++target)
    for (std::size_t row = 0; row < outputs[target].src_rank.size(); ++row)
      if (outputs[target].src_rank[row] == rank)
        expected.remote[target].push_back(
            {static_cast<std::int64_t>(row), outputs[target].src_idx[row]});
  if (c.groups != Groups::kNone) find_groups(c, outputs, expected);
  expected.received = std::move(outputs[static_cast<std::size_t>(rank)]);
  expected.sources.resize(static_cast<std::size_t>(expected.received.num_rows));
  // memcpy refuses the null pointers of empty vectors.
  if (!expected.sources.empty())
    std::memcpy(expected.sources.data(), expected.received.x.data(), expected.received.x.size());
  count_layout(c, expected);
  if (c.node_size() < c.ranks) find_records(c, routings, expected);
  return expected;
}

plan::reference::CombineOutput expected_combine(const Case& c, const Expected& expected, int round,
                                                std::int64_t first, std::int64_t count,
                                                bool weights) {
  const auto ranks = static_cast<std::size_t>(c.ranks);
  const auto row_bytes = static_cast<std::size_t>(count) * size_of(c.combine_dtype);
  std::vector<plan::reference::DispatchOutput> routing(ranks);
  std::vector<plan::reference::CombineInput> inputs(ranks);
  std::vector<std::int64_t> tokens(ranks, 0);
  tokens[static_cast<std::size_t>(expected.rank)] = c.tokens_of(expected.rank);
  for (std::size_t target = 0; target < ranks; ++target) {
    const auto& remote = expected.remote[target];
    routing[target].num_rows = static_cast<std::int64_t>(remote.size());
    routing[target].src_rank.assign(remote.size(), expected.rank);
    inputs[target].x.resize(remote.size() * row_bytes);
    if (c.groups != Groups::kNone)
      inputs[target].x = reduced_rows(c, expected, target, round, first, count);
    if (weights)
      inputs[target].topk_weights.resize(remote.size() * static_cast<std::size_t>(c.topk));
    for (std::size_t i = 0; i < remote.size(); ++i) {
      routing[target].src_idx.push_back(remote[i].token);
      const int rank = static_cast<int>(target);
      if (c.groups == Groups::kNone)
        fill_row(row_key(c, Rows::kCombine, round, rank, remote[i].row), c.combine_dtype, first,
                 count, inputs[target].x.data() + i * row_bytes);
      if (weights)
        fill_weights(row_key(c, Rows::kCombineWeights, round, rank, remote[i].row), c.topk,
                     inputs[target].topk_weights.data() + i * static_cast<std::size_t>(c.topk));
    }
  }
  auto& own = inputs[static_cast<std::size_t>(expected.rank)];
  const std::int64_t own_tokens = c.tokens_of(expected.rank);
  for (int b = 0; b < c.biases; ++b) {
    own.bias[b].resize(static_cast<std::size_t>(own_tokens) * row_bytes);
    for (std::int64_t token = 0; token < own_tokens; ++token)
      fill_row(row_key(c, b == 0 ? Rows::kBias0 : Rows::kBias1, round, expected.rank, token),
               c.combine_dtype, first, count,
               own.bias[b].data() + static_cast<std::size_t>(token) * row_bytes);
  }
  auto outputs = plan::reference::combine(c.combine_dtype, count, weights ? c.topk : 0, routing,
                                          tokens, inputs, c.node_size());
  return std::move(outputs[static_cast<std::size_t>(expected.rank)]);
}

}  // namespace deep_ep::verify
