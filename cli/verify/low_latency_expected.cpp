#include "verify/low_latency_expected.hpp"

#include <algorithm>
#include <cstring>

#include "verify/expected.hpp"
#include "verify/payload.hpp"
#include "verify/random.hpp"

namespace deep_ep::verify {
namespace {

namespace reference = plan::reference;

reference::LowLatencyShape shape_of(const LowLatencyCase& c) {
  reference::LowLatencyShape shape;
  shape.num_topk = c.topk;
  shape.num_experts = c.experts;
  shape.num_ranks = c.ranks;
  shape.rank_major = c.rank_major;
  shape.wire = c.wire;
  return shape;
}

std::vector<std::byte> filled_row(const LowLatencyCase& c, Rows kind, DType dtype,
                                  std::int64_t columns, const std::vector<std::int64_t>& name) {
  std::vector<std::byte> row(static_cast<std::size_t>(columns) * size_of(dtype));
  fill_row(make_key(c.seed, kind, name[0], name[1], name[2]), dtype, 0, columns, row.data());
  return row;
}

/// Whoever is masked has no tokens and no experts.
void leave_out_masked(const LowLatencyCase& c, int rank, std::vector<std::int64_t>& ids) {
  if (c.masked == LowLatencyCase::kNobody) return;
  if (rank == c.masked) ids.clear();
  for (std::int64_t& id : ids)
    if (id >= 0 && id / (c.experts / c.ranks) == c.masked) id = -1;
}

}  // namespace

LowLatencyRows::LowLatencyRows(const LowLatencyCase& c) {
  using enum LowLatencyPayload;
  use_fp8 = c.payload == kFp8 || c.payload == kFp8Rounded || c.payload == kFp8Ue8m0;
  use_ue8m0 = c.payload == kFp8Ue8m0;
  round_scale = c.payload == kFp8Rounded || use_ue8m0;
  scales_given = c.payload == kScaledFp8 || c.payload == kScaledPacked;
  scales_by_column = c.payload == kScaledPacked;
  x_dtype = DType::kBfloat16;
  if (c.payload == kFloat16) x_dtype = DType::kFloat16;
  if (c.payload == kFloat32) x_dtype = DType::kFloat32;
  if (c.payload == kBytes) x_dtype = DType::kUint8;
  if (scales_given) x_dtype = DType::kFloat8E4m3;
  recv_dtype = use_fp8 ? DType::kFloat8E4m3 : x_dtype;
  if (use_fp8 || scales_given) num_scales = static_cast<int>((c.hidden + 127) / 128);
  if (use_ue8m0 || c.payload == kScaledPacked) {
    num_scales = (num_scales + 3) / 4;
    scale_dtype = DType::kInt32;
  }
}

std::vector<std::byte> low_latency_x(const LowLatencyCase& c, int round, int rank,
                                     std::int64_t token) {
  return filled_row(c, Rows::kX, LowLatencyRows(c).x_dtype, c.hidden, {round, rank, token});
}

std::vector<std::byte> low_latency_scales(const LowLatencyCase& c, int round, int rank,
                                          std::int64_t token) {
  const LowLatencyRows rows(c);
  return filled_row(c, Rows::kScales, rows.scale_dtype, rows.num_scales, {round, rank, token});
}

void fill_expert_row(const LowLatencyCase& c, int round, int rank, std::int64_t row,
                     std::int64_t first, std::int64_t count, std::byte* out) {
  fill_row(make_key(c.seed, Rows::kCombine, round, rank, row), DType::kBfloat16, first, count, out);
}

LowLatencyExpected::LowLatencyExpected(const LowLatencyCase& c, int number) : round(number) {
  RoutingSpec spec;
  spec.routing = c.routing;
  spec.topk = c.topk;
  spec.experts = c.experts;
  spec.ranks = c.ranks;
  spec.seed = make_key(c.seed, number);
  for (spec.rank = 0; spec.rank < c.ranks; ++spec.rank) {
    spec.tokens = c.tokens_of(spec.rank);
    reference::DispatchInput input;
    input.topk_idx = make_routing(spec);
    topk_idx.push_back(input.topk_idx);
    leave_out_masked(c, spec.rank, input.topk_idx);
    input.num_tokens = static_cast<std::int64_t>(input.topk_idx.size()) / c.topk;
    input.topk_weights.resize(input.topk_idx.size());
    fill_weights(make_key(c.seed, 0x77656967, spec.rank, number),
                 static_cast<std::int64_t>(input.topk_idx.size()), input.topk_weights.data());
    inputs.push_back(std::move(input));
  }
  received = reference::low_latency_dispatch(shape_of(c), c.capacity(), inputs);
}

reference::QuantizedRow received_row(const LowLatencyCase& c, int round, int source,
                                     std::int64_t token) {
  const LowLatencyRows rows(c);
  std::vector<std::byte> x = low_latency_x(c, round, source, token);
  if (rows.use_fp8)
    return reference::quantize_row(x, rows.use_ue8m0     ? reference::LowLatencyScales::kUe8m0
                                      : rows.round_scale ? reference::LowLatencyScales::kPowerOfTwo
                                                         : reference::LowLatencyScales::kFloat32);
  return {std::move(x), rows.scales_given ? low_latency_scales(c, round, source, token)
                                          : std::vector<std::byte>()};
}

// In blocks of columns, so that the oracle's copies of all rows stay small, and of the rows of
// this rank's tokens only.
std::vector<std::byte> expected_combine(const LowLatencyCase& c,
                                        const LowLatencyExpected& dispatched, int round, int rank) {
  constexpr std::int64_t kBlock = 256;
  const auto ranks = static_cast<std::size_t>(c.ranks);
  const std::int64_t rows_of_group = c.rank_major ? c.capacity() : c.ranks * c.capacity();
  std::vector<reference::LowLatencyReceived> received(ranks);
  std::vector<std::vector<std::vector<std::int64_t>>> names(ranks);  // rows, by rank and group
  for (std::size_t r = 0; r < ranks; ++r) {
    for (std::size_t g = 0; g < dispatched.received[r].groups.size(); ++g) {
      const reference::LowLatencyGroup& all = dispatched.received[r].groups[g];
      reference::LowLatencyGroup& own = received[r].groups.emplace_back();
      std::vector<std::int64_t>& rows = names[r].emplace_back();
      for (std::size_t row = 0; row < all.src_rank.size(); ++row) {
        if (all.src_rank[row] != rank) continue;
        own.src_rank.push_back(rank);
        own.src_idx.push_back(all.src_idx[row]);
        rows.push_back(static_cast<std::int64_t>(g) * rows_of_group +
                       static_cast<std::int64_t>(row));
      }
    }
  }
  const reference::DispatchInput& mine = dispatched.inputs[static_cast<std::size_t>(rank)];
  std::vector<std::byte> combined(static_cast<std::size_t>(mine.num_tokens * c.hidden) * 2);
  for (std::int64_t first = 0; first < c.hidden; first += kBlock) {
    const std::int64_t count = std::min(kBlock, c.hidden - first);
    std::vector<reference::LowLatencyCombineInput> inputs(ranks);
    for (std::size_t r = 0; r < ranks; ++r) {
      for (const std::vector<std::int64_t>& rows : names[r]) {
        std::vector<std::byte>& x = inputs[r].x.emplace_back(rows.size() * count * 2);
        for (std::size_t i = 0; i < rows.size(); ++i)
          fill_expert_row(c, round, static_cast<int>(r), rows[i], first, count,
                          x.data() + i * count * 2);
      }
    }
    inputs[static_cast<std::size_t>(rank)].topk_idx = mine.topk_idx;
    inputs[static_cast<std::size_t>(rank)].topk_weights = mine.topk_weights;
    const std::vector<std::byte> block =
        reference::low_latency_combine(shape_of(c), count, received, inputs)[rank];
    for (std::int64_t token = 0; token < mine.num_tokens; ++token)
      std::memcpy(combined.data() + (token * c.hidden + first) * 2,
                  block.data() + token * count * 2, static_cast<std::size_t>(count) * 2);
  }
  return combined;
}

}  // namespace deep_ep::verify
