#include "verify/checks.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>

#include "plan/layout.hpp"
#include "verify/payload.hpp"

namespace deep_ep::verify {

void Checks::stage(std::string name, const EventHandle& event) {
  compare_.set_stage(std::move(name));
  compare_.expect(event.query(), "the call's event has happened");
}

void Checks::layout(const DispatchLayout& layout) {
  if (compare_.shape("num_tokens_per_rank", layout.num_tokens_per_rank, DType::kInt32,
                     {case_.ranks}))
    compare_.values("num_tokens_per_rank", layout.num_tokens_per_rank,
                    expected_.num_tokens_per_rank);
  if (compare_.shape("num_tokens_per_expert", layout.num_tokens_per_expert, DType::kInt32,
                     {case_.experts}))
    compare_.values("num_tokens_per_expert", layout.num_tokens_per_expert,
                    expected_.num_tokens_per_expert);
  if (compare_.shape("is_token_in_rank", layout.is_token_in_rank, DType::kBool,
                     {inputs_.tokens(), case_.ranks}))
    compare_.values("is_token_in_rank", layout.is_token_in_rank, expected_.is_token_in_rank);
  const int nodes = case_.ranks / case_.node_size();
  if (nodes == 1) {
    compare_.expect(!layout.num_tokens_per_rdma_rank.defined(),
                    "num_tokens_per_rdma_rank is undefined on one node");
  } else if (compare_.shape("num_tokens_per_rdma_rank", layout.num_tokens_per_rdma_rank,
                            DType::kInt32, {nodes})) {
    compare_.values("num_tokens_per_rdma_rank", layout.num_tokens_per_rdma_rank,
                    expected_.internode.num_tokens_per_rdma_rank);
  }
}

void Checks::counts(std::int64_t rows, const std::vector<std::int32_t>& list, bool worst) {
  compare_.expect(
      rows == (worst ? -1 : expected_.received.num_rows),
      fmt::format("num_recv_tokens = {} is {}", rows, worst ? -1 : expected_.received.num_rows));
  const auto want =
      worst ? std::vector<std::int32_t>() : expected_.received.num_tokens_per_local_expert;
  compare_.expect(list == want,
                  fmt::format("num_recv_tokens_per_expert_list = {} is {}", list, want));
}

void Checks::prepared(const PreparedDispatch& got) {
  counts(got.num_recv_tokens, got.num_recv_tokens_per_expert_list, false);
  compare_.expect(
      got.num_experts == case_.experts && got.expert_alignment == case_.expert_alignment,
      "num_experts and expert_alignment are those that were given");
  if (case_.node_size() < case_.ranks) {
    std::size_t records = 0;
    for (const auto& tokens : expected_.internode.record_tokens) records += tokens.size();
    compare_.expect(
        got.num_rdma_recv_tokens == static_cast<std::int64_t>(records),
        fmt::format("num_rdma_recv_tokens = {} is {}", got.num_rdma_recv_tokens, records));
    compare_.expect(!got.internode_handle.recv_src_meta.defined(),
                    "recv_src_meta is undefined before the dispatch");
    return;
  }
  compare_.expect(!got.handle.recv_src_idx.defined(),
                  "recv_src_idx is undefined before the dispatch");
}

void Checks::first_dispatch(const DispatchResult& got) {
  counts(got.num_recv_tokens, got.num_recv_tokens_per_expert_list, case_.num_worst_tokens != 0);
  topk(got);
  if (case_.node_size() < case_.ranks) {
    handle(got.internode_handle);
  } else {
    handle(got.handle);
  }
}

void Checks::topk(const DispatchResult& got) {
  if (!case_.pass_topk) {
    compare_.expect(!got.recv_topk_idx.defined() && !got.recv_topk_weights.defined(),
                    "recv_topk_idx and recv_topk_weights are undefined without topk_idx");
    return;
  }
  const auto topk = static_cast<std::size_t>(case_.topk);
  const auto elements = static_cast<std::size_t>(inputs_.result_rows()) * topk;
  std::vector<std::int64_t> ids = expected_.received.topk_idx;
  ids.resize(elements, -1);
  if (compare_.shape("recv_topk_idx", got.recv_topk_idx, case_.topk_dtype,
                     {inputs_.result_rows(), case_.topk})) {
    if (case_.topk_dtype == DType::kInt64)
      compare_.values("recv_topk_idx", got.recv_topk_idx, ids);
    else
      compare_.values("recv_topk_idx", got.recv_topk_idx,
                      std::vector<std::int32_t>(ids.begin(), ids.end()));
  }
  if (!case_.weights) {
    compare_.expect(!got.recv_topk_weights.defined(),
                    "recv_topk_weights is undefined without topk_weights");
    return;
  }
  std::vector<float> weights = expected_.received.topk_weights;
  weights.resize(elements, 0.0F);
  if (compare_.shape("recv_topk_weights", got.recv_topk_weights, DType::kFloat32,
                     {inputs_.result_rows(), case_.topk}))
    compare_.values("recv_topk_weights", got.recv_topk_weights, weights);
}

void Checks::cached_dispatch(const DispatchResult& got) {
  // The rows of the handle, which may be those of num_worst_tokens.
  compare_.expect(
      got.num_recv_tokens == inputs_.result_rows(),
      fmt::format("num_recv_tokens = {} is {}", got.num_recv_tokens, inputs_.result_rows()));
  compare_.expect(got.num_recv_tokens_per_expert_list.empty(),
                  "num_recv_tokens_per_expert_list is empty when cached");
  compare_.expect(!got.recv_topk_idx.defined() && !got.recv_topk_weights.defined(),
                  "recv_topk_idx and recv_topk_weights are undefined when cached");
  compare_.expect(!got.handle.rank_prefix_matrix.defined() && !got.handle.send_head.defined() &&
                      !got.internode_handle.recv_src_meta.defined(),
                  "the handle is undefined when cached");
}

void Checks::payload(const DispatchResult& got, int round) {
  const auto source = [this](std::int64_t row) {
    return expected_.sources[static_cast<std::size_t>(row)];
  };
  Comparator::RowCheck check;
  check.rows = expected_.received.num_rows;
  check.origin = [source](std::int64_t row) {
    return fmt::format(" (token {} of rank {})", source(row).token, source(row).rank);
  };
  check.fill = [&, source](std::int64_t row, std::byte* out) {
    fill_row(row_key(case_, Rows::kX, round, source(row).rank, source(row).token), case_.dtype, 0,
             case_.hidden, out);
  };
  if (compare_.shape("recv_x", got.recv_x, case_.dtype, {inputs_.result_rows(), case_.hidden}))
    compare_.rows("recv_x", got.recv_x, check);
  if (case_.scales == Scales::kNone) {
    compare_.expect(!got.recv_x_scales.defined(), "recv_x_scales is undefined without x_scales");
    return;
  }
  const DType dtype = scales_dtype(case_.scales);
  check.fill = [&, source, dtype](std::int64_t row, std::byte* out) {
    fill_row(row_key(case_, Rows::kScales, round, source(row).rank, source(row).token), dtype, 0,
             num_scales(case_), out);
  };
  if (compare_.shape("recv_x_scales", got.recv_x_scales, dtype,
                     {inputs_.result_rows(), num_scales(case_)}))
    compare_.rows("recv_x_scales", got.recv_x_scales, check);
}

void Checks::handle(const IntranodeHandle& handle) {
  if (compare_.shape("rank_prefix_matrix", handle.rank_prefix_matrix, DType::kInt32,
                     {case_.ranks, case_.ranks}))
    compare_.values("rank_prefix_matrix", handle.rank_prefix_matrix,
                    expected_.received.rank_prefix_matrix);
  std::vector<std::int32_t> src_idx = expected_.received.src_idx;
  src_idx.resize(static_cast<std::size_t>(inputs_.result_rows()), -1);
  if (compare_.shape("recv_src_idx", handle.recv_src_idx, DType::kInt32, {inputs_.result_rows()}))
    compare_.values("recv_src_idx", handle.recv_src_idx, src_idx);
  if (compare_.shape("handle.is_token_in_rank", handle.is_token_in_rank, DType::kBool,
                     {inputs_.tokens(), case_.ranks}))
    compare_.values("handle.is_token_in_rank", handle.is_token_in_rank, expected_.is_token_in_rank);
  if (compare_.shape("send_head", handle.send_head, DType::kInt32, {inputs_.tokens(), case_.ranks}))
    compare_.values("send_head", handle.send_head, expected_.send_head);
  channels(handle);
}

void Checks::channels(const IntranodeHandle& handle) {
  const int channels = static_cast<int>(handle.channel_prefix_matrix.shape[1]);
  const auto ranks = static_cast<std::size_t>(case_.ranks);
  std::vector<std::int32_t> sent, received;
  for (std::size_t target = 0; target < ranks; ++target)
    for (int c = 0; c < channels; ++c) {
      const std::int64_t end = plan::channel_begin(inputs_.tokens(), c + 1, channels);
      std::int32_t count = 0;
      for (std::int64_t token = 0; token < end; ++token)
        count += expected_.is_token_in_rank[static_cast<std::size_t>(token) * ranks + target];
      sent.push_back(count);
    }
  for (int source = 0; source < case_.ranks; ++source)
    for (int c = 0; c < channels; ++c) {
      const std::int64_t begin = plan::channel_begin(case_.tokens_of(source), c, channels);
      std::int32_t count = 0;
      for (const RowSource& row : expected_.sources)
        count += row.rank == source && row.token < begin ? 1 : 0;
      received.push_back(count);
    }
  compare_.expect(channels >= 1, "a handle has at least one channel");
  if (compare_.shape("channel_prefix_matrix", handle.channel_prefix_matrix, DType::kInt32,
                     {case_.ranks, channels}))
    compare_.values("channel_prefix_matrix", handle.channel_prefix_matrix, sent);
  if (compare_.shape("recv_channel_prefix_matrix", handle.recv_channel_prefix_matrix, DType::kInt32,
                     {case_.ranks, channels}))
    compare_.values("recv_channel_prefix_matrix", handle.recv_channel_prefix_matrix, received);
}

// In blocks of columns, so that the oracle's copies of all rows stay small.
std::vector<std::byte> Checks::expected_rows(int round) const {
  constexpr std::int64_t kBlock = 256;
  const std::size_t size = size_of(case_.combine_dtype);
  std::vector<std::byte> rows(static_cast<std::size_t>(inputs_.tokens() * case_.hidden) * size);
  for (std::int64_t first = 0; first < case_.hidden; first += kBlock) {
    const std::int64_t count = std::min(kBlock, case_.hidden - first);
    const auto block = expected_combine(case_, expected_, round, first, count, false);
    for (std::int64_t token = 0; token < inputs_.tokens(); ++token)
      std::memcpy(rows.data() + static_cast<std::size_t>(token * case_.hidden + first) * size,
                  block.x.data() + static_cast<std::size_t>(token * count) * size,
                  static_cast<std::size_t>(count) * size);
  }
  return rows;
}

void Checks::combined(const CombineResult& got, int round) {
  if (compare_.shape("combined_x", got.combined_x, case_.combine_dtype,
                     {inputs_.tokens(), case_.hidden})) {
    const std::vector<std::byte> want = expected_rows(round);
    const std::size_t row_bytes =
        static_cast<std::size_t>(case_.hidden) * size_of(case_.combine_dtype);
    Comparator::RowCheck check;
    check.rows = inputs_.tokens();
    check.fill = [&want, row_bytes](std::int64_t row, std::byte* out) {
      std::memcpy(out, want.data() + static_cast<std::size_t>(row) * row_bytes, row_bytes);
    };
    compare_.rows("combined_x", got.combined_x, check);
  }
  if (!case_.weights) {
    compare_.expect(!got.combined_topk_weights.defined(),
                    "combined_topk_weights is undefined without topk_weights");
    return;
  }
  if (compare_.shape("combined_topk_weights", got.combined_topk_weights, DType::kFloat32,
                     {inputs_.tokens(), case_.topk}))
    compare_.values("combined_topk_weights", got.combined_topk_weights,
                    expected_combine(case_, expected_, round, 0, 8, true).topk_weights);
}

void Checks::unchanged_x(const Tensor& x, int round) {
  Comparator::RowCheck check;
  check.rows = inputs_.tokens();
  check.fill = [&](std::int64_t row, std::byte* out) {
    fill_row(row_key(case_, Rows::kX, round, expected_.rank, row), case_.dtype, 0, case_.hidden,
             out);
  };
  compare_.rows("x, an input that must stay as it was,", x, check);
}

void Checks::stats(const Tensor& stats) {
  if (!stats.defined()) return;
  for (int source = 0; source < case_.ranks; ++source)
    compare_.expect(stats.as<std::int64_t>()[source] >= CaseInputs::kStatsStart,
                    fmt::format("wait statistics of rank {} only grow", source));
}

}  // namespace deep_ep::verify
