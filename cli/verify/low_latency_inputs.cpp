#include "verify/low_latency_inputs.hpp"

#include <algorithm>
#include <cstring>

namespace deep_ep::verify {

Tensor LowLatencyInputs::make_rows(
    DType dtype, std::int64_t columns,
    const std::function<std::vector<std::byte>(std::int64_t)>& make) const {
  Tensor tensor = Tensor::empty(dtype, {tokens(), columns});
  for (std::int64_t token = 0; token < tokens(); ++token) {
    const std::vector<std::byte> row = make(token);
    std::memcpy(tensor.as<std::byte>() + token * static_cast<std::int64_t>(row.size()), row.data(),
                row.size());
  }
  return tensor;
}

Tensor LowLatencyInputs::x() const {
  return make_rows(rows_.x_dtype, case_.hidden, [&](std::int64_t token) {
    return low_latency_x(case_, dispatched_.round, rank_, token);
  });
}

Tensor LowLatencyInputs::scales() const {
  if (!rows_.scales_given) return {};
  Tensor rows = make_rows(rows_.scale_dtype, rows_.num_scales, [&](std::int64_t token) {
    return low_latency_scales(case_, dispatched_.round, rank_, token);
  });
  if (!rows_.scales_by_column) return rows;
  Tensor turned = Tensor::empty(rows.dtype, {rows_.num_scales, tokens()});
  for (std::int64_t token = 0; token < tokens(); ++token)
    for (std::int64_t s = 0; s < rows_.num_scales; ++s)
      turned.as<std::uint32_t>()[s * tokens() + token] =
          rows.as<std::uint32_t>()[token * rows_.num_scales + s];
  turned.shape = {tokens(), rows_.num_scales};
  turned.strides = {1, tokens()};
  return turned;
}

Tensor LowLatencyInputs::topk_idx() const {
  Tensor ids = Tensor::empty(case_.topk_dtype, {tokens(), case_.topk});
  const std::vector<std::int64_t>& mine = dispatched_.topk_idx[static_cast<std::size_t>(rank_)];
  for (std::size_t i = 0; i < mine.size(); ++i) {
    if (case_.topk_dtype == DType::kInt64)
      ids.as<std::int64_t>()[i] = mine[i];
    else
      ids.as<std::int32_t>()[i] = static_cast<std::int32_t>(mine[i]);
  }
  return ids;
}

Tensor LowLatencyInputs::topk_weights() const {
  Tensor weights = Tensor::empty(DType::kFloat32, {tokens(), case_.topk});
  const auto& mine = dispatched_.inputs[static_cast<std::size_t>(rank_)].topk_weights;
  std::copy(mine.begin(), mine.end(), weights.as<float>());
  return weights;
}

Tensor LowLatencyInputs::expert_rows(int round) const {
  constexpr std::size_t kMostPoison = std::size_t{32} << 20;
  const std::int64_t groups = dispatched_.num_groups();
  const std::int64_t rows_of_group =
      case_.rank_major ? case_.capacity() : case_.ranks * case_.capacity();
  Tensor rows = Tensor::empty(DType::kBfloat16, {groups, rows_of_group, case_.hidden});
  if (rows.nbytes() <= kMostPoison) std::memset(rows.data, 0xff, rows.nbytes());
  const auto& received = dispatched_.received[static_cast<std::size_t>(rank_)].groups;
  for (std::size_t g = 0; g < received.size(); ++g) {
    for (std::size_t i = 0; i < received[g].src_idx.size(); ++i) {
      const std::int64_t row =
          static_cast<std::int64_t>(g) * rows_of_group + static_cast<std::int64_t>(i);
      fill_expert_row(case_, round, rank_, row, 0, case_.hidden,
                      rows.as<std::byte>() + row * case_.hidden * 2);
    }
  }
  return rows;
}

}  // namespace deep_ep::verify
