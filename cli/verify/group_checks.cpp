#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "verify/checks.hpp"
#include "verify/payload.hpp"

namespace deep_ep::verify {

void Checks::groups(const DispatchResult& got, int round, bool found) {
  if (case_.groups == Groups::kNone) {
    compare_.expect(!got.grouped_x.defined() && !got.grouped_x_scales.defined() &&
                        !got.groups.group_offsets.defined(),
                    "there are no groups without group_rows");
    return;
  }
  grouped_rows(got, round);
  if (!found) return;
  const plan::reference::RowGroups& want = expected_.groups;
  const std::int64_t grouped = inputs_.grouped_rows();
  if (compare_.shape("group_offsets", got.groups.group_offsets, DType::kInt32,
                     {case_.experts / case_.ranks + 1}))
    compare_.values("group_offsets", got.groups.group_offsets, want.group_offsets);
  std::vector<std::int32_t> rows = want.grouped_rows;
  rows.resize(static_cast<std::size_t>(inputs_.result_rows() * case_.topk), -1);
  if (compare_.shape("grouped_rows", got.groups.grouped_rows, DType::kInt32,
                     {inputs_.result_rows(), case_.topk}))
    compare_.values("grouped_rows", got.groups.grouped_rows, rows);
  std::vector<std::int32_t> recv_rows = want.recv_rows;
  recv_rows.resize(static_cast<std::size_t>(grouped), -1);
  if (compare_.shape("recv_rows", got.groups.recv_rows, DType::kInt32, {grouped}))
    compare_.values("recv_rows", got.groups.recv_rows, recv_rows);
  if (!case_.weights) {
    compare_.expect(!got.groups.weights.defined(), "groups.weights needs topk_weights");
    return;
  }
  std::vector<float> weights = want.weights;
  weights.resize(static_cast<std::size_t>(grouped), 0.0F);
  if (compare_.shape("groups.weights", got.groups.weights, DType::kFloat32, {grouped}))
    compare_.values("groups.weights", got.groups.weights, weights);
}

void Checks::grouped_rows(const DispatchResult& got, int round) {
  const std::int64_t grouped = inputs_.grouped_rows();
  const auto check = [&](const char* name, const Tensor& tensor, Rows kind, DType dtype,
                         std::int64_t columns) {
    if (!compare_.shape(name, tensor, dtype, {grouped, columns})) return;
    Comparator::RowCheck rows;
    rows.rows = static_cast<std::int64_t>(expected_.groups.recv_rows.size());
    rows.origin = [&](std::int64_t row) {
      return fmt::format(" (received row {})",
                         expected_.groups.recv_rows[static_cast<std::size_t>(row)]);
    };
    rows.fill = [&](std::int64_t row, std::byte* out) {
      const std::int32_t from = expected_.groups.recv_rows[static_cast<std::size_t>(row)];
      if (from < 0) {
        std::memset(out, 0, static_cast<std::size_t>(columns) * size_of(dtype));
        return;
      }
      const RowSource source = expected_.sources[static_cast<std::size_t>(from)];
      fill_row(row_key(case_, kind, round, source.rank, source.token), dtype, 0, columns, out);
    };
    compare_.rows(name, tensor, rows);
  };
  check("grouped_x", got.grouped_x, Rows::kX, case_.dtype, case_.hidden);
  if (case_.scales == Scales::kNone) {
    compare_.expect(!got.grouped_x_scales.defined(), "grouped_x_scales needs x_scales");
    return;
  }
  check("grouped_x_scales", got.grouped_x_scales, Rows::kScales, scales_dtype(case_.scales),
        num_scales(case_));
}

}  // namespace deep_ep::verify
