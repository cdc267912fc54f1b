#include "mpi/mpi_low_latency.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "backend/host/quantize.hpp"
#include "backend/host/rows.hpp"
#include "base/error.hpp"
#include "plan/numerics.hpp"

namespace deep_ep::bench {
namespace {

using internode_ll::Quantization;

std::int64_t first_of(const std::vector<int>& counts, int rank) {
  return std::accumulate(counts.begin(), counts.begin() + rank, std::int64_t{0});
}

}  // namespace

MpiLowLatency::MpiLowLatency(const verify::LowLatencyCase& c, int rank)
    : c_(c),
      rank_(rank),
      local_experts_(c.experts / c.ranks),
      rows_of_expert_(c.ranks * c.capacity()),
      row_bytes_(c.hidden + c.hidden / plan::kFp8Group * 4),
      message_bytes_((4 + std::int64_t{4} * c.topk + 15) / 16 * 16 + row_bytes_),
      home_bytes_(2 * c.hidden),
      sent_(c.ranks),
      got_(c.ranks),
      message_of_(c.capacity() * c.ranks),
      rows_(rows_of_expert_ * c.topk),
      weights_out_(rows_of_expert_ * c.topk),
      weights_in_(rows_of_expert_ * c.topk),
      out_(rows_of_expert_ * message_bytes_),
      in_(rows_of_expert_ * message_bytes_),
      home_out_(rows_of_expert_ * home_bytes_),
      home_in_(rows_of_expert_ * home_bytes_) {
  const std::int64_t scales = c.hidden / plan::kFp8Group;
  received_.recv_x = Tensor::empty(DType::kFloat8E4m3, {local_experts_, rows_of_expert_, c.hidden});
  received_.recv_x_scales =
      Tensor::empty(DType::kFloat32, {local_experts_, rows_of_expert_, scales});
  received_.recv_x_scales.strides = {scales * rows_of_expert_, 1, rows_of_expert_};
  received_.recv_count = Tensor::empty(DType::kInt32, {local_experts_});
  received_.handle.src_info = Tensor::empty(DType::kInt32, {local_experts_, rows_of_expert_});
  received_.handle.layout_range = Tensor::empty(DType::kInt64, {local_experts_, c.ranks});
  received_.handle.num_max_dispatch_tokens_per_rank = static_cast<int>(c.capacity());
  received_.handle.hidden = c.hidden;
  received_.handle.num_experts = c.experts;
  combined_ = Tensor::empty(DType::kBfloat16, {c.tokens_of(rank), c.hidden});
}

LowLatencyDispatchResult MpiLowLatency::received() const { return received_; }
Tensor MpiLowLatency::combined() const { return combined_; }

void MpiLowLatency::count_messages(const std::int64_t* topk_idx) {
  std::fill(sent_.begin(), sent_.end(), 0);
  std::fill(message_of_.begin(), message_of_.end(), -1);
  for (std::int64_t token = 0; token < c_.tokens_of(rank_); ++token) {
    for (int k = 0; k < c_.topk; ++k) {
      const std::int64_t id = topk_idx[token * c_.topk + k];
      if (id < 0) continue;
      const std::int64_t rank = id / local_experts_;
      std::int32_t& message = message_of_[token * c_.ranks + rank];
      if (message < 0) message = sent_[rank]++;
    }
  }
}

void MpiLowLatency::exchange(const std::byte* from, std::byte* to, std::int64_t bytes,
                             bool back) const {
  const auto in_bytes = [&](const std::vector<int>& messages) {
    std::vector<int> counts;
    for (const int count : messages) counts.push_back(static_cast<int>(count * bytes));
    return counts;
  };
  const auto offsets = [](const std::vector<int>& counts) {
    std::vector<int> begins(counts.size(), 0);
    std::partial_sum(counts.begin(), counts.end() - 1, begins.begin() + 1);
    return begins;
  };
  const std::vector<int> sent = in_bytes(back ? got_ : sent_);
  const std::vector<int> got = in_bytes(back ? sent_ : got_);
  const int result = MPI_Alltoallv(from, sent.data(), offsets(sent).data(), MPI_BYTE, to,
                                   got.data(), offsets(got).data(), MPI_BYTE, MPI_COMM_WORLD);
  require(result == MPI_SUCCESS, "MPI_Alltoallv failed with {}", result);
}

void MpiLowLatency::dispatch(const std::byte* x, const std::int64_t* topk_idx) {
  count_messages(topk_idx);
  MPI_Alltoall(sent_.data(), 1, MPI_INT, got_.data(), 1, MPI_INT, MPI_COMM_WORLD);
  const std::int64_t head = message_bytes_ - row_bytes_;
  for (std::int64_t token = 0; token < c_.tokens_of(rank_); ++token) {
    const std::byte* row = nullptr;  // quantised once
    for (int rank = 0; rank < c_.ranks; ++rank) {
      const std::int32_t message = message_of_[token * c_.ranks + rank];
      if (message < 0) continue;
      std::byte* to = out_.data() + (first_of(sent_, rank) + message) * message_bytes_;
      auto* words = reinterpret_cast<std::int32_t*>(to);
      words[0] = static_cast<std::int32_t>(token);
      for (int k = 0; k < c_.topk; ++k) {
        const std::int64_t local = topk_idx[token * c_.topk + k] - rank * local_experts_;
        words[1 + k] = local >= 0 && local < local_experts_ ? static_cast<std::int32_t>(local) : -1;
      }
      if (row != nullptr) {
        std::memcpy(to + head, row, row_bytes_);
        continue;
      }
      host::quantize_row(x + token * home_bytes_, c_.hidden, Quantization::kFp8, to + head,
                         to + head + c_.hidden);
      row = to + head;
    }
  }
  exchange(out_.data(), in_.data(), message_bytes_, false);
  unpack();
}

void MpiLowLatency::unpack() {
  auto* counts = received_.recv_count.as<std::int32_t>();
  auto* ranges = received_.handle.layout_range.as<std::int64_t>();
  std::fill_n(counts, local_experts_, 0);
  const std::int64_t scales = c_.hidden / plan::kFp8Group;
  const std::byte* message = in_.data();
  std::int64_t* place = rows_.data();
  for (int source = 0; source < c_.ranks; ++source) {
    std::vector<std::int32_t> begins(counts, counts + local_experts_);
    for (int j = 0; j < got_[source]; ++j, message += message_bytes_, place += c_.topk) {
      const auto* words = reinterpret_cast<const std::int32_t*>(message);
      const std::byte* row = message + message_bytes_ - row_bytes_;
      for (int k = 0; k < c_.topk; ++k) {
        place[k] = -1;
        const std::int32_t expert = words[1 + k];
        if (expert < 0) continue;
        const std::int64_t at = expert * rows_of_expert_ + counts[expert]++;
        place[k] = at;
        std::memcpy(received_.recv_x.as<std::byte>() + at * c_.hidden, row, c_.hidden);
        received_.handle.src_info.as<std::int32_t>()[at] = words[0];
        auto* to = received_.recv_x_scales.as<std::uint32_t>() + expert * scales * rows_of_expert_ +
                   at % rows_of_expert_;
        for (std::int64_t s = 0; s < scales; ++s)
          std::memcpy(to + s * rows_of_expert_, row + c_.hidden + 4 * s, 4);
      }
    }
    for (int expert = 0; expert < local_experts_; ++expert)
      ranges[expert * c_.ranks + source] =
          std::int64_t{begins[expert]} << 32 | (counts[expert] - begins[expert]);
  }
}

void MpiLowLatency::combine(const std::byte* y, const std::int64_t* topk_idx,
                            const float* topk_weights) {
  send_weights(topk_idx, topk_weights);
  reduce(y);
  exchange(home_out_.data(), home_in_.data(), home_bytes_, true);
  sum();
}

void MpiLowLatency::send_weights(const std::int64_t* topk_idx, const float* topk_weights) {
  for (std::int64_t token = 0; token < c_.tokens_of(rank_); ++token) {
    for (int rank = 0; rank < c_.ranks; ++rank) {
      const std::int32_t message = message_of_[token * c_.ranks + rank];
      if (message < 0) continue;
      float* to = weights_out_.data() + (first_of(sent_, rank) + message) * c_.topk;
      for (int k = 0; k < c_.topk; ++k) {
        const std::int64_t entry = token * c_.topk + k;
        to[k] = topk_idx[entry] / local_experts_ == rank ? topk_weights[entry] : 0.0f;
      }
    }
  }
  exchange(reinterpret_cast<const std::byte*>(weights_out_.data()),
           reinterpret_cast<std::byte*>(weights_in_.data()), std::int64_t{4} * c_.topk, false);
}

// The experts of a token ascend as their rows do.
void MpiLowLatency::reduce(const std::byte* y) {
  const std::int64_t messages = std::accumulate(got_.begin(), got_.end(), std::int64_t{0});
  std::vector<std::pair<std::int64_t, float>> entries;
  std::vector<const std::byte*> sources;
  std::vector<float> weights;
  for (std::int64_t j = 0; j < messages; ++j) {
    entries.clear();
    for (int k = 0; k < c_.topk; ++k)
      if (const std::int64_t row = rows_[j * c_.topk + k]; row >= 0)
        entries.emplace_back(row, weights_in_[j * c_.topk + k]);
    std::sort(entries.begin(), entries.end());
    sources.clear();
    weights.clear();
    for (const auto& [row, weight] : entries) {
      sources.push_back(y + row * home_bytes_);
      weights.push_back(weight);
    }
    host::SumPiece piece;
    piece.count = c_.hidden;
    piece.sources = sources.data();
    piece.num_sources = static_cast<int>(sources.size());
    piece.weights = weights.data();
    piece.out = home_out_.data() + j * home_bytes_;
    host::sum_piece(piece, host::Stores::kCached);
  }
}

void MpiLowLatency::sum() {
  std::vector<const std::byte*> sources;
  for (std::int64_t token = 0; token < c_.tokens_of(rank_); ++token) {
    sources.clear();
    for (int rank = 0; rank < c_.ranks; ++rank) {
      const std::int32_t message = message_of_[token * c_.ranks + rank];
      if (message >= 0)
        sources.push_back(home_in_.data() + (first_of(sent_, rank) + message) * home_bytes_);
    }
    host::SumPiece piece;
    piece.count = c_.hidden;
    piece.sources = sources.data();
    piece.num_sources = static_cast<int>(sources.size());
    piece.out = combined_.as<std::byte>() + token * home_bytes_;
    host::sum_piece(piece, host::Stores::kCached);
  }
}

}  // namespace deep_ep::bench
