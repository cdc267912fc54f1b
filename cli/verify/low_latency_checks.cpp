#include "verify/low_latency_checks.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <set>

namespace deep_ep::verify {
namespace {

using plan::reference::LowLatencyGroup;

std::int64_t num_rows(const LowLatencyGroup& group) {
  return static_cast<std::int64_t>(group.src_idx.size());
}

/// Rows [0, rows) of one group of a tensor [groups, rows, ...].
TensorView rows_of(const TensorView& tensor, std::int64_t group, std::int64_t rows) {
  const std::int64_t columns = tensor.numel() / (tensor.shape[0] * tensor.shape[1]);
  return {tensor.as<std::byte>() +
              group * tensor.shape[1] * columns * static_cast<std::int64_t>(size_of(tensor.dtype)),
          tensor.dtype,
          {rows, columns}};
}

}  // namespace

void LowLatencyChecks::dispatched(const LowLatencyDispatchResult& got,
                                  const LowLatencyExpected& expected) {
  payload(got, expected);
  scales(got.recv_x_scales, expected);
  topk(got, expected);
  handle(got.handle, expected);
  std::vector<std::int32_t> counts;
  for (const LowLatencyGroup& group : mine(expected).groups)
    counts.push_back(static_cast<std::int32_t>(num_rows(group)));
  if (compare_.shape("recv_count", got.recv_count, DType::kInt32, {expected.num_groups()}))
    compare_.values("recv_count", got.recv_count, counts);
}

void LowLatencyChecks::payload(const LowLatencyDispatchResult& got,
                               const LowLatencyExpected& expected) {
  if (!compare_.shape("recv_x", got.recv_x, LowLatencyRows(case_).recv_dtype,
                      {expected.num_groups(), rows_of_group(), case_.hidden}))
    return;
  for (std::int64_t g = 0; g < expected.num_groups(); ++g) {
    const LowLatencyGroup& group = mine(expected).groups[static_cast<std::size_t>(g)];
    Comparator::RowCheck check;
    check.rows = num_rows(group);
    check.fill = [&](std::int64_t row, std::byte* out) {
      const auto want =
          received_row(case_, expected.round, group.src_rank[row], group.src_idx[row]);
      std::memcpy(out, want.x.data(), want.x.size());
    };
    check.origin = [&](std::int64_t row) {
      return fmt::format(" (token {} of rank {})", group.src_idx[row], group.src_rank[row]);
    };
    compare_.rows(fmt::format("recv_x[{}]", g), rows_of(got.recv_x, g, check.rows), check);
  }
}

void LowLatencyChecks::scales(const Tensor& got, const LowLatencyExpected& expected) {
  const LowLatencyRows rows(case_);
  if (rows.num_scales == 0) {
    compare_.expect(!got.defined(), "recv_x_scales is undefined without scales");
    return;
  }
  const std::int64_t groups = expected.num_groups();
  const bool right = got.ndim == 3 && got.dtype == rows.scale_dtype && got.shape[0] == groups &&
                     got.shape[1] == rows_of_group() && got.shape[2] == rows.num_scales &&
                     got.strides[1] == 1;
  compare_.expect(right,
                  fmt::format("recv_x_scales is {} with {} scales a row, column by column",
                              got.defined() ? got.describe() : "undefined", rows.num_scales));
  if (!right) return;
  for (std::int64_t g = 0; g < groups; ++g) {
    const LowLatencyGroup& group = mine(expected).groups[static_cast<std::size_t>(g)];
    const Tensor packed = Tensor::empty(rows.scale_dtype, {num_rows(group), rows.num_scales});
    for (std::int64_t row = 0; row < num_rows(group); ++row)
      for (std::int64_t s = 0; s < rows.num_scales; ++s)
        packed.as<std::uint32_t>()[row * rows.num_scales + s] =
            got.as<std::uint32_t>()[g * got.strides[0] + row + s * got.strides[2]];
    Comparator::RowCheck check;
    check.rows = num_rows(group);
    check.fill = [&](std::int64_t row, std::byte* out) {
      const auto want =
          received_row(case_, expected.round, group.src_rank[row], group.src_idx[row]);
      std::memcpy(out, want.scales.data(), want.scales.size());
    };
    compare_.rows(fmt::format("recv_x_scales[{}]", g), packed, check);
  }
}

void LowLatencyChecks::topk(const LowLatencyDispatchResult& got,
                            const LowLatencyExpected& expected) {
  if (!case_.rank_major) {
    compare_.expect(!got.recv_topk_idx.defined() && !got.recv_topk_weights.defined(),
                    "recv_topk_idx and recv_topk_weights are undefined when expert-major");
    return;
  }
  const auto size = static_cast<std::size_t>(rows_of_group() * case_.topk);
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
  for (const LowLatencyGroup& group : mine(expected).groups) {
    ids.insert(ids.end(), group.topk_idx.begin(), group.topk_idx.end());
    weights.insert(weights.end(), group.topk_weights.begin(), group.topk_weights.end());
    ids.resize((ids.size() + size - group.topk_idx.size()), -1);
    weights.resize(ids.size(), 0.0F);
  }
  const std::vector<std::int64_t> shape{case_.ranks, case_.capacity(), case_.topk};
  if (compare_.shape("recv_topk_idx", got.recv_topk_idx, case_.topk_dtype, shape)) {
    if (case_.topk_dtype == DType::kInt64)
      compare_.values("recv_topk_idx", got.recv_topk_idx, ids);
    else
      compare_.values("recv_topk_idx", got.recv_topk_idx,
                      std::vector<std::int32_t>(ids.begin(), ids.end()));
  }
  if (!case_.weights) {
    compare_.expect(!got.recv_topk_weights.defined(),
                    "recv_topk_weights is undefined without topk_weights");
  } else if (compare_.shape("recv_topk_weights", got.recv_topk_weights, DType::kFloat32, shape)) {
    compare_.values("recv_topk_weights", got.recv_topk_weights, weights);
  }
}

void LowLatencyChecks::handle(const LowLatencyHandle& handle, const LowLatencyExpected& expected) {
  const std::vector<std::int64_t>& layout_range = mine(expected).layout_range;
  if (compare_.shape("layout_range", handle.layout_range, DType::kInt64,
                     {case_.rank_major ? 1 : expected.num_groups(), case_.ranks}))
    compare_.values("layout_range", handle.layout_range, layout_range);
  if (compare_.shape("src_info", handle.src_info, DType::kInt32,
                     {expected.num_groups(), rows_of_group()})) {
    for (std::int64_t g = 0; g < expected.num_groups(); ++g) {
      const LowLatencyGroup& group = mine(expected).groups[static_cast<std::size_t>(g)];
      compare_.values(fmt::format("src_info[{}]", g), rows_of(handle.src_info, g, num_rows(group)),
                      group.src_idx);
    }
  }
  compare_.expect(handle.num_max_dispatch_tokens_per_rank == case_.capacity() &&
                      handle.hidden == case_.hidden && handle.num_experts == case_.experts &&
                      (handle.format == LowLatencyFormat::kRankMajor) == case_.rank_major,
                  "the handle has the numbers of the call");
}

void LowLatencyChecks::unchanged_x(const Tensor& x, const LowLatencyExpected& expected) {
  Comparator::RowCheck check;
  check.rows = x.shape[0];
  check.fill = [&](std::int64_t row, std::byte* out) {
    const auto want = low_latency_x(case_, expected.round, rank_, row);
    std::memcpy(out, want.data(), want.size());
  };
  compare_.rows("x, an input that must stay as it was,", x, check);
}

void LowLatencyChecks::combined(const Tensor& got, const LowLatencyExpected& expected, int round) {
  const std::int64_t tokens = expected.inputs[static_cast<std::size_t>(rank_)].num_tokens;
  if (!compare_.shape("combined_x", got, DType::kBfloat16, {tokens, case_.hidden})) return;
  const std::vector<std::byte> want = expected_combine(case_, expected, round, rank_);
  const auto row_bytes = static_cast<std::size_t>(case_.hidden) * 2;
  Comparator::RowCheck check;
  check.rows = tokens;
  check.fill = [&](std::int64_t row, std::byte* out) {
    std::memcpy(out, want.data() + static_cast<std::size_t>(row) * row_bytes, row_bytes);
  };
  compare_.rows("combined_x", got, check);
}

void LowLatencyChecks::wait_stats(const Tensor& stats) {
  if (!stats.defined()) return;
  for (int source = 0; source < case_.ranks; ++source)
    compare_.expect(stats.as<std::int64_t>()[source] >= kStatsStart,
                    fmt::format("wait statistics of rank {} only grow", source));
}

void LowLatencyChecks::expert_stats(const Tensor& stats,
                                    const std::vector<LowLatencyExpected>& dispatched) {
  if (!stats.defined()) return;
  std::vector<std::int32_t> want(static_cast<std::size_t>(case_.experts / case_.ranks),
                                 kStatsStart);
  for (const LowLatencyExpected& expected : dispatched) {
    for (std::size_t g = 0; g < mine(expected).groups.size(); ++g) {
      const LowLatencyGroup& group = mine(expected).groups[g];
      if (!case_.rank_major) {
        want[g] += static_cast<std::int32_t>(num_rows(group));
        continue;
      }
      for (std::int64_t row = 0; row < num_rows(group); ++row) {
        const auto begin = group.topk_idx.begin() + row * case_.topk;
        for (const std::int64_t id : std::set<std::int64_t>(begin, begin + case_.topk))
          if (id >= 0) ++want[static_cast<std::size_t>(id)];
      }
    }
  }
  compare_.values("cumulative_local_expert_recv_stats", stats, want);
}

void LowLatencyChecks::masks(const Tensor& masks) {
  std::vector<std::int32_t> want(static_cast<std::size_t>(case_.ranks), 0);
  want[static_cast<std::size_t>(case_.masked)] = 1;
  compare_.values("the mask", masks, want);
}

}  // namespace deep_ep::verify
