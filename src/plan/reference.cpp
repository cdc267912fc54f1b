#include "plan/reference.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.hpp"
#include "plan/numerics.hpp"

namespace deep_ep::plan::reference {
namespace {

template <class T>
void append(std::vector<T>& to, const std::vector<T>& from, std::int64_t row, std::int64_t width) {
  to.insert(to.end(), from.begin() + row * width, from.begin() + (row + 1) * width);
}

template <class T>
bool has_rows(const std::vector<T>& array, std::int64_t rows, std::int64_t width) {
  return static_cast<std::int64_t>(array.size()) == rows * width;
}

void check(const DispatchShape& shape, const std::vector<DispatchInput>& inputs, bool weights) {
  require(static_cast<int>(inputs.size()) == shape.num_ranks && shape.num_ranks >= 1,
          "{} inputs for {} ranks", inputs.size(), shape.num_ranks);
  require(shape.num_experts >= 1 && shape.num_experts % shape.num_ranks == 0,
          "{} experts over {} ranks", shape.num_experts, shape.num_ranks);
  require(shape.expert_alignment >= 1, "expert_alignment {}", shape.expert_alignment);
  for (const DispatchInput& input : inputs) {
    require(has_rows(input.x, input.num_tokens, shape.x_bytes) &&
                has_rows(input.scales, input.num_tokens, shape.scale_bytes) &&
                has_rows(input.topk_idx, input.num_tokens, shape.num_topk) &&
                has_rows(input.topk_weights, input.num_tokens, weights ? shape.num_topk : 0),
            "an array of an input does not have its {} rows", input.num_tokens);
    for (const std::int64_t id : input.topk_idx)
      require(id >= -1 && id < shape.num_experts, "expert {} of {}", id, shape.num_experts);
  }
}

/// The experts [first, last) of one rank.
struct Owned {
  std::int64_t first;
  std::int64_t last;
  bool has(std::int64_t id) const { return id >= first && id < last; }
};

bool goes_to(const Owned& owned, const DispatchInput& input, std::int64_t token, int num_topk) {
  for (int k = 0; k < num_topk; ++k)
    if (owned.has(input.topk_idx[token * num_topk + k])) return true;
  return false;
}

std::int32_t rounded_up(std::int64_t count, int alignment) {
  while (count % alignment != 0) ++count;
  return static_cast<std::int32_t>(count);
}

DispatchOutput receive(const DispatchShape& shape, const std::vector<DispatchInput>& inputs,
                       int rank, bool weights) {
  const std::int64_t num_local_experts = shape.num_experts / shape.num_ranks;
  const Owned owned{rank * num_local_experts, (rank + 1) * num_local_experts};
  std::vector<std::int64_t> expert_counts(num_local_experts, 0);
  DispatchOutput out;
  for (int source = 0; source < shape.num_ranks; ++source) {
    const DispatchInput& input = inputs[source];
    for (std::int64_t token = 0; token < input.num_tokens; ++token) {
      if (!goes_to(owned, input, token, shape.num_topk)) continue;
      append(out.x, input.x, token, shape.x_bytes);
      append(out.scales, input.scales, token, shape.scale_bytes);
      out.src_rank.push_back(source);
      out.src_idx.push_back(static_cast<std::int32_t>(token));
      for (int k = 0; k < shape.num_topk; ++k) {
        const std::int64_t entry = token * shape.num_topk + k;
        const std::int64_t id = input.topk_idx[entry];
        out.topk_idx.push_back(owned.has(id) ? id - owned.first : -1);
        if (weights) out.topk_weights.push_back(owned.has(id) ? input.topk_weights[entry] : 0.0f);
        if (owned.has(id)) ++expert_counts[id - owned.first];
      }
      ++out.num_rows;
    }
  }
  for (const std::int64_t count : expert_counts)
    out.num_tokens_per_local_expert.push_back(rounded_up(count, shape.expert_alignment));
  return out;
}

/// Element [i][j] counts the rows of rank j that came from ranks 0..i.
std::vector<std::int32_t> prefix_matrix(const std::vector<DispatchOutput>& outputs) {
  const int num_ranks = static_cast<int>(outputs.size());
  std::vector<std::int32_t> matrix;
  for (int i = 0; i < num_ranks; ++i) {
    for (int j = 0; j < num_ranks; ++j) {
      std::int32_t rows = 0;
      for (const std::int32_t source : outputs[j].src_rank)
        if (source <= i) ++rows;
      matrix.push_back(rows);
    }
  }
  return matrix;
}

/// Where the tokens of one source went: [rank][token] = row at that rank, or -1.
using RowTable = std::vector<std::vector<std::int64_t>>;

RowTable rows_of_source(const std::vector<DispatchOutput>& routing, int source,
                        std::int64_t num_tokens) {
  RowTable table(routing.size(), std::vector<std::int64_t>(num_tokens, -1));
  for (std::size_t rank = 0; rank < routing.size(); ++rank)
    for (std::int64_t row = 0; row < routing[rank].num_rows; ++row)
      if (routing[rank].src_rank[row] == source) table[rank][routing[rank].src_idx[row]] = row;
  return table;
}

template <class T>
void add_row(std::vector<float>& sums, const std::vector<std::byte>& array, std::int64_t row) {
  const std::byte* from = array.data() + row * sums.size() * sizeof(T);
  for (std::size_t h = 0; h < sums.size(); ++h) {
    T value;
    std::memcpy(&value, from + h * sizeof(T), sizeof(T));
    sums[h] = add(sums[h], to_float(value));
  }
}

template <class T>
void append_rounded(std::vector<std::byte>& array, const std::vector<float>& sums) {
  for (const float sum : sums) {
    const T rounded = from_float<T>(sum);
    const auto* bytes = reinterpret_cast<const std::byte*>(&rounded);
    array.insert(array.end(), bytes, bytes + sizeof(T));
  }
}

/// The ranks [first, last) of one node.
struct Node {
  std::size_t first;
  std::size_t last;
};
std::vector<Node> nodes_of(std::size_t num_ranks, int ranks_per_node) {
  std::vector<Node> nodes;
  const auto size = static_cast<std::size_t>(ranks_per_node);
  for (std::size_t first = 0; first < num_ranks; first += size)
    nodes.push_back({first, std::min(num_ranks, first + size)});
  return nodes;
}

/// Adds a node's rows of the token, rounded if there are other nodes.
template <class T>
void add_node(std::vector<float>& sums, const RowTable& rows, std::int64_t token,
              const std::vector<CombineInput>& inputs, const Node& node) {
  const bool alone = node.last - node.first == inputs.size();
  std::vector<float> own(alone ? 0 : sums.size(), 0.0f);
  std::vector<float>& to = alone ? sums : own;
  bool any = false;
  for (std::size_t rank = node.first; rank < node.last; ++rank) {
    if (rows[rank][token] < 0) continue;
    add_row<T>(to, inputs[rank].x, rows[rank][token]);
    any = true;
  }
  if (alone || !any) return;
  for (std::size_t h = 0; h < sums.size(); ++h)
    sums[h] = add(sums[h], to_float(from_float<T>(own[h])));
}

template <class T>
std::vector<std::byte> sum_rows(const RowTable& rows, std::int64_t num_tokens, std::int64_t hidden,
                                const std::vector<CombineInput>& inputs, int source,
                                const std::vector<Node>& nodes) {
  std::vector<std::byte> out;
  out.reserve(num_tokens * hidden * sizeof(T));
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    std::vector<float> sums(hidden, 0.0f);
    for (const Node& node : nodes) add_node<T>(sums, rows, token, inputs, node);
    for (const std::vector<std::byte>& bias : inputs[source].bias)
      if (!bias.empty()) add_row<T>(sums, bias, token);
    append_rounded<T>(out, sums);
  }
  return out;
}

std::vector<float> sum_weights(const RowTable& rows, std::int64_t num_tokens, int num_topk,
                               const std::vector<CombineInput>& inputs,
                               const std::vector<Node>& nodes) {
  std::vector<float> out;
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    for (int k = 0; k < num_topk; ++k) {
      float sum = 0.0f;
      for (const Node& node : nodes) {
        float own = 0.0f;
        for (std::size_t rank = node.first; rank < node.last; ++rank)
          if (const std::int64_t row = rows[rank][token]; row >= 0)
            own = add(own, inputs[rank].topk_weights[row * num_topk + k]);
        sum = add(sum, own);
      }
      out.push_back(from_float<float>(sum));
    }
  }
  return out;
}

using SumRows = std::vector<std::byte> (*)(const RowTable&, std::int64_t, std::int64_t,
                                           const std::vector<CombineInput>&, int,
                                           const std::vector<Node>&);

struct Summation {
  SumRows sum_rows;
  std::int64_t element_bytes;
};

Summation summation_of(DType dtype) {
  switch (dtype) {
    case DType::kBfloat16:
      return {sum_rows<Bfloat16>, 2};
    case DType::kFloat16:
      return {sum_rows<Float16>, 2};
    case DType::kFloat32:
      return {sum_rows<float>, 4};
    default:
      throw Error(ErrorCode::kInvalidArgument, "only bfloat16, float16 and float32 are summed");
  }
}

/// What combine reads of one rank.
struct CombineSizes {
  std::int64_t row_bytes;
  std::int64_t num_weights;  // a row
  std::int64_t num_rows;
  std::int64_t num_tokens;
};

void check(const CombineInput& input, const CombineSizes& sizes) {
  require(static_cast<std::int64_t>(input.x.size()) >= sizes.num_rows * sizes.row_bytes,
          "x has {} bytes for {} rows of {}", input.x.size(), sizes.num_rows, sizes.row_bytes);
  require(
      static_cast<std::int64_t>(input.topk_weights.size()) >= sizes.num_rows * sizes.num_weights,
      "topk_weights has {} values for {} rows of {}", input.topk_weights.size(), sizes.num_rows,
      sizes.num_weights);
  for (const std::vector<std::byte>& bias : input.bias)
    require(bias.empty() || has_rows(bias, sizes.num_tokens, sizes.row_bytes),
            "bias has {} bytes for {} tokens of {}", bias.size(), sizes.num_tokens,
            sizes.row_bytes);
}

/// The weights of a received row's entries that name an expert, or nothing if none does.
struct Entries {
  int count = 0;
  float weight = 0.0f;
};
Entries entries_of(const DispatchOutput& received, std::int64_t row, int num_topk,
                   std::int64_t expert) {
  Entries found;
  for (int k = 0; k < num_topk; ++k) {
    const std::int64_t entry = row * num_topk + k;
    if (received.topk_idx[entry] != expert) continue;
    ++found.count;
    if (!received.topk_weights.empty())
      found.weight = add(found.weight, received.topk_weights[entry]);
  }
  found.weight = from_float<float>(found.weight);
  return found;
}

template <class T>
std::vector<std::byte> sum_groups(std::int64_t hidden, std::int64_t num_rows,
                                  const GroupedInput& input) {
  std::vector<std::vector<float>> sums(num_rows, std::vector<float>(hidden, 0.0f));
  for (std::size_t g = 0; g < input.recv_rows.size(); ++g) {
    if (input.recv_rows[g] < 0) continue;
    std::vector<float>& row = sums[input.recv_rows[g]];
    for (std::int64_t h = 0; h < hidden; ++h) {
      T value;
      std::memcpy(&value, input.x.data() + (g * hidden + h) * sizeof(T), sizeof(T));
      row[h] = input.weights.empty() ? add(row[h], to_float(value))
                                     : accumulate(row[h], input.weights[g], to_float(value));
    }
  }
  std::vector<std::byte> out;
  for (const std::vector<float>& row : sums) append_rounded<T>(out, row);
  return out;
}

}  // namespace

std::vector<DispatchOutput> dispatch(const DispatchShape& shape,
                                     const std::vector<DispatchInput>& inputs) {
  bool weights = false;
  for (const DispatchInput& input : inputs) weights = weights || !input.topk_weights.empty();
  check(shape, inputs, weights);

  std::vector<DispatchOutput> outputs(shape.num_ranks);
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    outputs[rank] = receive(shape, inputs, rank, weights);
  const std::vector<std::int32_t> matrix = prefix_matrix(outputs);
  for (DispatchOutput& output : outputs) output.rank_prefix_matrix = matrix;
  return outputs;
}

RowGroups group_rows(const DispatchOutput& received, int num_topk, int num_local_experts,
                     int expert_alignment) {
  require(expert_alignment >= 1, "expert_alignment {}", expert_alignment);
  RowGroups groups;
  groups.grouped_rows.assign(received.topk_idx.size(), -1);
  groups.group_offsets.push_back(0);
  for (int expert = 0; expert < num_local_experts; ++expert) {
    std::int64_t room = 0;
    for (std::int64_t row = 0; row < received.num_rows; ++row) {
      const Entries entries = entries_of(received, row, num_topk, expert);
      if (entries.count == 0) continue;
      room += entries.count;
      for (int k = 0; k < num_topk; ++k)
        if (received.topk_idx[row * num_topk + k] == expert)
          groups.grouped_rows[row * num_topk + k] =
              static_cast<std::int32_t>(groups.recv_rows.size());
      groups.recv_rows.push_back(static_cast<std::int32_t>(row));
      if (!received.topk_weights.empty()) groups.weights.push_back(entries.weight);
    }
    groups.group_offsets.push_back(groups.group_offsets.back() +
                                   rounded_up(room, expert_alignment));
    groups.recv_rows.resize(groups.group_offsets.back(), -1);
    if (!received.topk_weights.empty()) groups.weights.resize(groups.group_offsets.back(), 0.0f);
  }
  return groups;
}

std::vector<std::byte> reduce_rows(DType dtype, std::int64_t hidden, std::int64_t num_rows,
                                   const GroupedInput& input) {
  const auto groups = static_cast<std::int64_t>(input.recv_rows.size());
  const std::int64_t bytes = summation_of(dtype).element_bytes;
  require(has_rows(input.x, groups, hidden * bytes), "x has {} bytes for {} rows of {}",
          input.x.size(), groups, hidden * bytes);
  require(input.weights.empty() || has_rows(input.weights, groups, 1), "{} weights for {} rows",
          input.weights.size(), groups);
  for (const std::int32_t row : input.recv_rows)
    require(row >= -1 && row < num_rows, "received row {} of {}", row, num_rows);
  switch (dtype) {
    case DType::kBfloat16:
      return sum_groups<Bfloat16>(hidden, num_rows, input);
    case DType::kFloat16:
      return sum_groups<Float16>(hidden, num_rows, input);
    default:
      return sum_groups<float>(hidden, num_rows, input);
  }
}

std::vector<CombineOutput> combine(DType dtype, std::int64_t hidden, int num_topk,
                                   const std::vector<DispatchOutput>& routing,
                                   const std::vector<std::int64_t>& num_tokens,
                                   const std::vector<CombineInput>& inputs, int ranks_per_node) {
  const Summation summation = summation_of(dtype);
  const std::size_t num_ranks = routing.size();
  require(num_tokens.size() == num_ranks && inputs.size() == num_ranks,
          "{} routings, {} numbers of tokens, {} inputs", num_ranks, num_tokens.size(),
          inputs.size());
  require(ranks_per_node >= 1, "ranks_per_node {}", ranks_per_node);
  const std::vector<Node> nodes = nodes_of(num_ranks, ranks_per_node);
  bool weights = false;
  for (const CombineInput& input : inputs) weights = weights || !input.topk_weights.empty();
  for (std::size_t rank = 0; rank < num_ranks; ++rank)
    check(inputs[rank], {hidden * summation.element_bytes, weights ? num_topk : 0,
                         routing[rank].num_rows, num_tokens[rank]});

  std::vector<CombineOutput> outputs;
  for (int source = 0; source < static_cast<int>(num_ranks); ++source) {
    const RowTable rows = rows_of_source(routing, source, num_tokens[source]);
    CombineOutput out;
    out.x = summation.sum_rows(rows, num_tokens[source], hidden, inputs, source, nodes);
    if (weights) out.topk_weights = sum_weights(rows, num_tokens[source], num_topk, inputs, nodes);
    outputs.push_back(std::move(out));
  }
  return outputs;
}

}  // namespace deep_ep::plan::reference
