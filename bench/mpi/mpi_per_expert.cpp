#include "mpi/mpi_per_expert.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "backend/host/quantize.hpp"
#include "backend/host/rows.hpp"
#include "base/error.hpp"
#include "plan/numerics.hpp"

namespace deep_ep::bench {

LowLatencyDispatchResult make_low_latency_result(const verify::LowLatencyCase& c) {
  const std::int64_t experts = c.experts / c.ranks;
  const std::int64_t rows = c.ranks * c.capacity();
  const std::int64_t scales = c.hidden / plan::kFp8Group;
  LowLatencyDispatchResult result;
  result.recv_x = Tensor::empty(DType::kFloat8E4m3, {experts, rows, c.hidden});
  result.recv_x_scales = Tensor::empty(DType::kFloat32, {experts, rows, scales});
  result.recv_x_scales.strides = {scales * rows, 1, rows};
  result.recv_count = Tensor::empty(DType::kInt32, {experts});
  result.handle.src_info = Tensor::empty(DType::kInt32, {experts, rows});
  result.handle.layout_range = Tensor::empty(DType::kInt64, {experts, c.ranks});
  result.handle.num_max_dispatch_tokens_per_rank = static_cast<int>(c.capacity());
  result.handle.hidden = c.hidden;
  result.handle.num_experts = c.experts;
  return result;
}

MpiPerExpert::MpiPerExpert(const verify::LowLatencyCase& c, int rank)
    : c_(c),
      rank_(rank),
      local_experts_(c.experts / c.ranks),
      rows_of_expert_(c.ranks * c.capacity()),
      row_bytes_(c.hidden + c.hidden / plan::kFp8Group * 4),
      message_bytes_(16 + row_bytes_),
      home_bytes_(2 * c.hidden),
      sent_(c.experts),
      got_(c.experts),
      place_(c.capacity() * c.topk),
      first_place_(c.experts),
      quantised_(c.capacity() * row_bytes_),
      out_(c.capacity() * c.topk * message_bytes_),
      in_(rows_of_expert_ * std::min(c.topk, local_experts_) * message_bytes_),
      home_out_(rows_of_expert_ * std::min(c.topk, local_experts_) * home_bytes_),
      home_in_(c.capacity() * c.topk * home_bytes_),
      received_(make_low_latency_result(c)),
      combined_(Tensor::empty(DType::kBfloat16, {c.tokens_of(rank), c.hidden})) {}

void MpiPerExpert::count_rows(const std::int64_t* topk_idx) {
  const std::int64_t entries = c_.tokens_of(rank_) * c_.topk;
  std::fill(sent_.begin(), sent_.end(), 0);
  for (std::int64_t i = 0; i < entries; ++i)
    if (topk_idx[i] >= 0) ++sent_[topk_idx[i]];
  std::exclusive_scan(sent_.begin(), sent_.end(), first_place_.begin(), std::int64_t{0});
  std::vector<std::int64_t> next = first_place_;
  for (std::int64_t i = 0; i < entries; ++i)
    place_[i] = topk_idx[i] >= 0 ? next[topk_idx[i]]++ : -1;
}

void MpiPerExpert::exchange(const std::byte* from, std::byte* to, std::int64_t bytes,
                            bool back) const {
  const auto of_ranks = [&](const std::vector<int>& rows) {
    std::vector<int> counts;
    for (int rank = 0; rank < c_.ranks; ++rank) {
      const auto begin = rows.begin() + std::int64_t{rank} * local_experts_;
      counts.push_back(static_cast<int>(std::accumulate(begin, begin + local_experts_, 0) * bytes));
    }
    return counts;
  };
  const auto offsets = [](const std::vector<int>& counts) {
    std::vector<int> begins(counts.size());
    std::exclusive_scan(counts.begin(), counts.end(), begins.begin(), 0);
    return begins;
  };
  const std::vector<int> sent = of_ranks(back ? got_ : sent_);
  const std::vector<int> got = of_ranks(back ? sent_ : got_);
  const int result = MPI_Alltoallv(from, sent.data(), offsets(sent).data(), MPI_BYTE, to,
                                   got.data(), offsets(got).data(), MPI_BYTE, MPI_COMM_WORLD);
  require(result == MPI_SUCCESS, "MPI_Alltoallv failed with {}", result);
}

void MpiPerExpert::dispatch(const std::byte* x, const std::int64_t* topk_idx) {
  count_rows(topk_idx);
  MPI_Alltoall(sent_.data(), local_experts_, MPI_INT, got_.data(), local_experts_, MPI_INT,
               MPI_COMM_WORLD);
  for (std::int64_t token = 0; token < c_.tokens_of(rank_); ++token) {
    std::byte* row = quantised_.data() + token * row_bytes_;
    host::quantize_row(x + token * home_bytes_, c_.hidden, internode_ll::Quantization::kFp8, row,
                       row + c_.hidden);
    for (int k = 0; k < c_.topk; ++k) {
      const std::int64_t place = place_[token * c_.topk + k];
      if (place < 0) continue;
      std::byte* to = out_.data() + place * message_bytes_;
      const auto name = static_cast<std::int32_t>(token);
      std::memcpy(to, &name, sizeof name);
      std::memcpy(to + 16, row, row_bytes_);
    }
  }
  exchange(out_.data(), in_.data(), message_bytes_, false);
  unpack();
}

void MpiPerExpert::unpack() {
  auto* counts = received_.recv_count.as<std::int32_t>();
  std::fill_n(counts, local_experts_, 0);
  const std::int64_t scales = c_.hidden / plan::kFp8Group;
  const std::byte* message = in_.data();
  for (int source = 0; source < c_.ranks; ++source) {
    for (int expert = 0; expert < local_experts_; ++expert) {
      const int rows = got_[source * local_experts_ + expert];
      received_.handle.layout_range.as<std::int64_t>()[expert * c_.ranks + source] =
          std::int64_t{counts[expert]} << 32 | rows;
      for (int i = 0; i < rows; ++i, message += message_bytes_) {
        const std::int64_t row = counts[expert]++;
        const std::int64_t at = expert * rows_of_expert_ + row;
        std::memcpy(received_.handle.src_info.as<std::int32_t>() + at, message, 4);
        std::memcpy(received_.recv_x.as<std::byte>() + at * c_.hidden, message + 16, c_.hidden);
        auto* to =
            received_.recv_x_scales.as<std::uint32_t>() + expert * scales * rows_of_expert_ + row;
        for (std::int64_t s = 0; s < scales; ++s)
          std::memcpy(to + s * rows_of_expert_, message + 16 + c_.hidden + 4 * s, 4);
      }
    }
  }
}

void MpiPerExpert::combine(const std::byte* y, const std::int64_t* topk_idx,
                           const float* topk_weights) {
  std::byte* to = home_out_.data();
  for (int source = 0; source < c_.ranks; ++source) {
    for (int expert = 0; expert < local_experts_; ++expert) {
      const std::int64_t range =
          received_.handle.layout_range.as<std::int64_t>()[expert * c_.ranks + source];
      const std::int64_t bytes = (range & 0xffffffff) * home_bytes_;
      std::memcpy(to, y + (expert * rows_of_expert_ + (range >> 32)) * home_bytes_, bytes);
      to += bytes;
    }
  }
  exchange(home_out_.data(), home_in_.data(), home_bytes_, true);
  std::vector<const std::byte*> sources;
  std::vector<float> weights;
  for (std::int64_t token = 0; token < c_.tokens_of(rank_); ++token) {
    sources.clear();
    weights.clear();
    for (int k = 0; k < c_.topk; ++k) {
      const std::int64_t entry = token * c_.topk + k;
      if (topk_idx[entry] < 0) continue;
      sources.push_back(home_in_.data() + place_[entry] * home_bytes_);
      weights.push_back(topk_weights[entry]);
    }
    host::SumPiece piece;
    piece.count = c_.hidden;
    piece.sources = sources.data();
    piece.num_sources = static_cast<int>(sources.size());
    piece.weights = weights.data();
    piece.out = combined_.as<std::byte>() + token * home_bytes_;
    host::sum_piece(piece, host::Stores::kCached);
  }
}

}  // namespace deep_ep::bench
