#include "verify/inputs.hpp"

#include <algorithm>
#include <cstring>

#include "verify/payload.hpp"

namespace deep_ep::verify {

CaseInputs::CaseInputs(const Case& c, const Expected& expected)
    : case_(c),
      expected_(expected),
      tokens_(c.tokens_of(expected.rank)),
      rows_(c.num_worst_tokens == 0 ? expected.received.num_rows : num_worst_tokens(c)) {}

std::int64_t CaseInputs::grouped_rows() const {
  const auto needed = static_cast<std::int64_t>(expected_.groups.recv_rows.size());
  // The caller who brings outputs says how many there may be: as many as there are.
  if (case_.num_worst_tokens == 0 || case_.outputs == Outputs::kPrivate) return needed;
  const std::int64_t entries = rows_ * case_.topk;
  return entries + std::min<std::int64_t>(entries, case_.experts / case_.ranks) *
                       (case_.expert_alignment - 1);
}

Tensor CaseInputs::token_rows(DType dtype, std::int64_t columns, Rows kind, int round) const {
  Tensor rows = Tensor::empty(dtype, {tokens_, columns});
  const std::int64_t row_bytes = columns * static_cast<std::int64_t>(size_of(dtype));
  for (std::int64_t token = 0; token < tokens_; ++token)
    fill_row(row_key(case_, kind, round, expected_.rank, token), dtype, 0, columns,
             rows.as<std::byte>() + token * row_bytes);
  return rows;
}

Tensor CaseInputs::x(int round) const {
  return token_rows(case_.dtype, case_.hidden, Rows::kX, round);
}

Tensor CaseInputs::bias(int b, int round) const {
  return token_rows(case_.combine_dtype, case_.hidden, b == 0 ? Rows::kBias0 : Rows::kBias1, round);
}

Tensor CaseInputs::scales(int round) const {
  const std::int64_t columns = num_scales(case_);
  if (columns == 0) return {};
  Tensor rows = token_rows(scales_dtype(case_.scales), columns, Rows::kScales, round);
  if (case_.scales != Scales::kFloat32ColumnMajor && case_.scales != Scales::kPackedColumnMajor)
    return rows;
  Tensor turned = Tensor::empty(rows.dtype, {columns, tokens_});
  for (std::int64_t token = 0; token < tokens_; ++token)
    for (std::int64_t s = 0; s < columns; ++s)
      turned.as<std::uint32_t>()[s * tokens_ + token] =
          rows.as<std::uint32_t>()[token * columns + s];
  turned.shape = {tokens_, columns};
  turned.strides = {1, tokens_};
  return turned;
}

Tensor CaseInputs::stats() const {
  if (!case_.wait_stats) return {};
  Tensor stats = Tensor::empty(DType::kInt64, {case_.ranks});
  std::fill_n(stats.as<std::int64_t>(), case_.ranks, kStatsStart);
  return stats;
}

Tensor CaseInputs::topk_idx() const {
  Tensor ids = Tensor::empty(case_.topk_dtype, {tokens_, case_.topk});
  for (std::size_t i = 0; i < expected_.own.topk_idx.size(); ++i) {
    if (case_.topk_dtype == DType::kInt64)
      ids.as<std::int64_t>()[i] = expected_.own.topk_idx[i];
    else
      ids.as<std::int32_t>()[i] = static_cast<std::int32_t>(expected_.own.topk_idx[i]);
  }
  return ids;
}

// Rows that nobody may read are NaN: a combine that read them would show it.
Tensor CaseInputs::combine_x(int round) const {
  const bool grouped = case_.groups != Groups::kNone;
  const std::int64_t count = grouped ? grouped_rows() : rows_;
  Tensor rows = Tensor::empty(case_.combine_dtype, {count, case_.hidden});
  if (count == 0) return rows;
  const std::int64_t row_bytes = static_cast<std::int64_t>(rows.nbytes()) / count;
  std::memset(rows.data, 0xff, rows.nbytes());
  const auto used = grouped ? static_cast<std::int64_t>(expected_.groups.recv_rows.size())
                            : expected_.received.num_rows;
  for (std::int64_t row = 0; row < used; ++row) {
    if (grouped && expected_.groups.recv_rows[static_cast<std::size_t>(row)] < 0) continue;
    fill_row(row_key(case_, Rows::kCombine, round, expected_.rank, row), rows.dtype, 0,
             case_.hidden, rows.as<std::byte>() + row * row_bytes);
  }
  return rows;
}

Tensor CaseInputs::combine_weights(int round) const {
  if (!case_.weights) return {};
  Tensor weights = Tensor::empty(DType::kFloat32, {rows_, case_.topk});
  std::memset(weights.data, 0xff, weights.nbytes());
  for (std::int64_t row = 0; row < expected_.received.num_rows; ++row)
    fill_weights(row_key(case_, Rows::kCombineWeights, round, expected_.rank, row), case_.topk,
                 weights.as<float>() + row * case_.topk);
  return weights;
}

Tensor CaseInputs::topk_weights() const {
  Tensor weights = Tensor::empty(DType::kFloat32, {tokens_, case_.topk});
  std::copy(expected_.own.topk_weights.begin(), expected_.own.topk_weights.end(),
            weights.as<float>());
  return weights;
}

}  // namespace deep_ep::verify
