#include "plan/reference_low_latency.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "base/error.hpp"
#include "plan/numerics.hpp"

namespace deep_ep::plan::reference {
namespace {

void check(const LowLatencyShape& shape, const std::vector<DispatchInput>& inputs, bool weights) {
  require(shape.num_ranks >= 1 && static_cast<int>(inputs.size()) == shape.num_ranks,
          "{} inputs for {} ranks", inputs.size(), shape.num_ranks);
  require(shape.num_experts >= 1 && shape.num_experts % shape.num_ranks == 0,
          "{} experts over {} ranks", shape.num_experts, shape.num_ranks);
  for (const DispatchInput& input : inputs) {
    const auto has = [&](std::size_t size, std::int64_t width) {
      return static_cast<std::int64_t>(size) == input.num_tokens * width;
    };
    require(has(input.x.size(), shape.x_bytes) && has(input.scales.size(), shape.scale_bytes) &&
                has(input.topk_idx.size(), shape.num_topk) &&
                has(input.topk_weights.size(), weights ? shape.num_topk : 0),
            "an array of an input does not have its {} rows", input.num_tokens);
    for (const std::int64_t id : input.topk_idx)
      require(id >= -1 && id < shape.num_experts, "expert {} of {}", id, shape.num_experts);
  }
}

bool names(const std::vector<std::int64_t>& topk_idx, int num_topk, std::int64_t token,
           std::int64_t first, std::int64_t last) {
  for (int k = 0; k < num_topk; ++k) {
    const std::int64_t id = topk_idx[token * num_topk + k];
    if (id >= first && id < last) return true;
  }
  return false;
}

void append_row(LowLatencyGroup& group, const LowLatencyShape& shape, const DispatchInput& input,
                int source, std::int64_t token) {
  const auto append = [token](std::vector<std::byte>& to, const std::vector<std::byte>& from,
                              std::int64_t width) {
    to.insert(to.end(), from.begin() + token * width, from.begin() + (token + 1) * width);
  };
  append(group.x, input.x, shape.x_bytes);
  append(group.scales, input.scales, shape.scale_bytes);
  group.src_rank.push_back(source);
  group.src_idx.push_back(static_cast<std::int32_t>(token));
}

void append_topk(LowLatencyGroup& group, const LowLatencyShape& shape, const DispatchInput& input,
                 std::int64_t token, std::int64_t first) {
  const std::int64_t local_experts = shape.num_experts / shape.num_ranks;
  for (int k = 0; k < shape.num_topk; ++k) {
    const std::int64_t entry = token * shape.num_topk + k;
    const std::int64_t local = input.topk_idx[entry] - first;
    const bool here = local >= 0 && local < local_experts;
    group.topk_idx.push_back(here ? local : -1);
    if (!input.topk_weights.empty())
      group.topk_weights.push_back(here ? input.topk_weights[entry] : 0.0f);
  }
}

/// Of rank `rank`, from the tokens of all sources.
LowLatencyReceived receive(const LowLatencyShape& shape, std::int64_t max_tokens,
                           const std::vector<DispatchInput>& inputs, int rank) {
  const std::int64_t local_experts = shape.num_experts / shape.num_ranks;
  const std::int64_t first = rank * local_experts;
  LowLatencyReceived received;
  received.groups.resize(shape.rank_major ? shape.num_ranks : local_experts);
  for (std::int64_t g = 0; g < static_cast<std::int64_t>(received.groups.size()); ++g) {
    LowLatencyGroup& group = received.groups[g];
    for (int source = 0; source < shape.num_ranks; ++source) {
      if (shape.rank_major && source != g) continue;
      const std::int64_t expert = shape.rank_major ? first : first + g;
      const std::int64_t end = shape.rank_major ? first + local_experts : expert + 1;
      const auto begin = static_cast<std::int64_t>(group.src_idx.size());
      for (std::int64_t token = 0; token < inputs[source].num_tokens; ++token) {
        if (!names(inputs[source].topk_idx, shape.num_topk, token, expert, end)) continue;
        append_row(group, shape, inputs[source], source, token);
        if (shape.rank_major) append_topk(group, shape, inputs[source], token, first);
      }
      const std::int64_t count = static_cast<std::int64_t>(group.src_idx.size()) - begin;
      received.layout_range.push_back((shape.rank_major ? g * max_tokens : begin) << 32 | count);
    }
  }
  return received;
}

/// One row of bfloat16 as float.
std::vector<float> row_of(const std::vector<std::byte>& array, std::int64_t row,
                          std::int64_t hidden) {
  std::vector<float> values;
  for (std::int64_t h = 0; h < hidden; ++h) {
    Bfloat16 value;
    std::memcpy(&value, array.data() + (row * hidden + h) * 2, 2);
    values.push_back(to_float(value));
  }
  return values;
}

/// The row of a group that is token `token` of rank `source`, or -1.
std::int64_t find_row(const LowLatencyGroup& group, int source, std::int64_t token) {
  for (std::size_t row = 0; row < group.src_idx.size(); ++row)
    if (group.src_rank[row] == source && group.src_idx[row] == token)
      return static_cast<std::int64_t>(row);
  return -1;
}

void round_all(std::vector<float>& values) {
  for (float& value : values) value = to_float(from_float<Bfloat16>(value));
}

void through_logfmt(float* group) {
  float amax = 0.0f;
  float amin = std::numeric_limits<float>::infinity();
  for (int i = 0; i < kLogFmtGroup; ++i) {
    amax = logfmt_amax(amax, group[i]);
    amin = logfmt_amin(amin, group[i]);
  }
  const LogFmtScale scale = logfmt_scale(logfmt_range(amax, amin));
  for (int i = 0; i < kLogFmtGroup; ++i)
    group[i] = dequantize_logfmt(quantize_logfmt(group[i], scale), scale);
}

void through_fp8(float* group) {
  float amax = 0.0f;
  for (int i = 0; i < kFp8Group; ++i) amax = fp8_amax(amax, group[i]);
  const Fp8Scale scale = fp8_scale(amax);
  for (int i = 0; i < kFp8Group; ++i)
    group[i] = dequantize_fp8(quantize_fp8(group[i], scale.inverse), scale.scale);
}

/// What the receiver makes of the codes that a row becomes.
void through_wire(WireFormat wire, std::vector<float>& row) {
  if (wire == WireFormat::kBfloat16) return;
  require(row.size() % kWireGroup == 0, "{} values are no multiple of {}", row.size(), kWireGroup);
  for (std::size_t begin = 0; begin < row.size(); begin += kWireGroup)
    wire == WireFormat::kLogFmt ? through_logfmt(&row[begin]) : through_fp8(&row[begin]);
}

/// What rank `rank` sends home for one token; false if it has none of its experts.
bool partial_sum(const LowLatencyShape& shape, const LowLatencyReceived& received,
                 const std::vector<LowLatencyCombineInput>& inputs,
                 const std::pair<int, std::int64_t>& token, int rank, std::vector<float>& sums) {
  const auto& [source, index] = token;
  const std::int64_t hidden = static_cast<std::int64_t>(sums.size());
  const std::int64_t local_experts = shape.num_experts / shape.num_ranks;
  bool any = false;
  for (std::size_t g = 0; g < received.groups.size(); ++g) {
    const std::int64_t row = find_row(received.groups[g], source, index);
    if (row < 0) continue;
    any = true;
    const std::vector<float> x = row_of(inputs[rank].x[g], row, hidden);
    if (shape.rank_major) {
      sums = x;
      return true;
    }
    float weight = 0.0f;
    for (int k = 0; k < shape.num_topk; ++k) {
      const std::int64_t entry = index * shape.num_topk + k;
      if (inputs[source].topk_idx[entry] == rank * local_experts + static_cast<std::int64_t>(g))
        weight = add(weight, inputs[source].topk_weights[entry]);
    }
    for (std::int64_t h = 0; h < hidden; ++h) sums[h] = accumulate(sums[h], weight, x[h]);
  }
  round_all(sums);
  return any;
}

}  // namespace

std::vector<LowLatencyReceived> low_latency_dispatch(const LowLatencyShape& shape,
                                                     std::int64_t max_tokens,
                                                     const std::vector<DispatchInput>& inputs) {
  bool weights = false;
  for (const DispatchInput& input : inputs) weights = weights || !input.topk_weights.empty();
  check(shape, inputs, weights);
  std::vector<LowLatencyReceived> received;
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    received.push_back(receive(shape, max_tokens, inputs, rank));
  return received;
}

QuantizedRow quantize_row(const std::vector<std::byte>& row, LowLatencyScales scales) {
  const std::vector<float> values = row_of(row, 0, static_cast<std::int64_t>(row.size() / 2));
  require(values.size() % kFp8Group == 0, "{} values are no multiple of {}", values.size(),
          kFp8Group);
  QuantizedRow out;
  for (std::size_t begin = 0; begin < values.size(); begin += kFp8Group) {
    float amax = 0.0f;
    for (std::size_t i = begin; i < begin + kFp8Group; ++i) amax = fp8_amax(amax, values[i]);
    const Fp8Scale scale =
        scales == LowLatencyScales::kFloat32 ? fp8_scale(amax) : fp8_power_of_two_scale(amax);
    for (std::size_t i = begin; i < begin + kFp8Group; ++i)
      out.x.push_back(std::byte{quantize_fp8(values[i], scale.inverse).bits});
    if (scales == LowLatencyScales::kUe8m0) {
      out.scales.push_back(std::byte{to_ue8m0(scale.scale)});
    } else {
      const auto* bytes = reinterpret_cast<const std::byte*>(&scale.scale);
      out.scales.insert(out.scales.end(), bytes, bytes + sizeof scale.scale);
    }
  }
  while (out.scales.size() % 4 != 0) out.scales.push_back(std::byte{0});
  return out;
}

std::vector<std::vector<std::byte>> low_latency_combine(
    const LowLatencyShape& shape, std::int64_t hidden,
    const std::vector<LowLatencyReceived>& received,
    const std::vector<LowLatencyCombineInput>& inputs) {
  std::vector<std::vector<std::byte>> outputs(shape.num_ranks);
  for (int source = 0; source < shape.num_ranks; ++source) {
    const auto tokens = static_cast<std::int64_t>(inputs[source].topk_idx.size()) / shape.num_topk;
    for (std::int64_t token = 0; token < tokens; ++token) {
      std::vector<float> sums(hidden, 0.0f);
      for (int rank = 0; rank < shape.num_ranks; ++rank) {
        std::vector<float> partial(hidden, 0.0f);
        if (!partial_sum(shape, received[rank], inputs, {source, token}, rank, partial)) continue;
        through_wire(shape.wire, partial);
        for (std::int64_t h = 0; h < hidden; ++h) sums[h] = add(sums[h], partial[h]);
      }
      for (const float sum : sums) {
        const auto bits = from_float<Bfloat16>(sum);
        const auto* bytes = reinterpret_cast<const std::byte*>(&bits);
        outputs[source].insert(outputs[source].end(), bytes, bytes + sizeof bits);
      }
    }
  }
  return outputs;
}

}  // namespace deep_ep::plan::reference
