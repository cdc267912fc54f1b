#include "plan/groups.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/host/intranode/checks.hpp"
#include "backend/host/intranode/steps.hpp"
#include "backend/host/rows.hpp"
#include "base/error.hpp"
#include "protocol/ticket.hpp"

// Rows by expert, all of it in this rank's memory: from received rows to groups, and back.
namespace deep_ep::host::intranode {

using deep_ep::intranode::GroupParams;
using deep_ep::intranode::ReduceParams;

namespace {

constexpr std::int64_t kRowsPerTicket = 16;
// Less than this per thread is done before another thread has woken up.
constexpr std::int64_t kBytesPerThread = 512 << 10;

/// work(row, rows of grouped rows that it may use as scratch) for rows 0 .. count - 1, by as many
/// threads as `bytes` in all are worth.
template <class Work>
void for_rows(Context& context, const Call& call, std::int64_t count, std::int64_t bytes,
              const Work& work) {
  const auto threads = std::clamp<std::int64_t>(bytes / kBytesPerThread, 1,
                                                std::min(context.pool().size(), call.num_threads));
  protocol::TicketCounter tickets{};
  context.pool().run(static_cast<int>(threads), [&](int) {
    std::vector<std::int32_t> own;
    for (;;) {
      const auto begin = static_cast<std::int64_t>(tickets.take()) * kRowsPerTicket;
      if (begin >= count) break;
      const std::int64_t end = std::min(begin + kRowsPerTicket, count);
      for (std::int64_t row = begin; row < end; ++row) work(row, own);
    }
    finish_stores();
  });
}

/// The grouped rows of a received row, each once, in ascending order, which is that of the experts.
void find_grouped_rows(const std::int32_t* entries, std::int64_t count,
                       std::vector<std::int32_t>& rows) {
  rows.assign(entries, entries + count);
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  if (!rows.empty() && rows.front() == -1) rows.erase(rows.begin());
}

template <class Id>
void find_groups(const GroupParams& params, std::int64_t received, int rank) {
  const std::int64_t total =
      plan::build_row_groups(params.shape, received, params.recv_topk_idx.as<const Id>(),
                             params.recv_topk_weights, params.groups);
  if (total <= params.shape.num_grouped_rows) return;
  throw Error(ErrorCode::kCapacity,
              fmt::format("{}: rank {} has {} grouped rows, grouped_x has room for {}",
                          params.call.operation, rank, total, params.shape.num_grouped_rows),
              {rank});
}

/// Offsets that are the caller's must be in bounds, too.
void check_groups(const GroupParams& params, std::int64_t received) {
  const plan::GroupShape& shape = params.shape;
  const std::int32_t end = params.groups.group_offsets[shape.num_local_experts];
  require(end >= 0 && end <= shape.num_grouped_rows,
          "groups.group_offsets[{}] is {}, must be in [0, {}], the length of groups.recv_rows",
          shape.num_local_experts, end, shape.num_grouped_rows);
  check_grouped_rows(params.groups.grouped_rows, received, shape.num_topk, shape.num_grouped_rows);
}

class Expansion {
 public:
  Expansion(Context& context, const GroupParams& params, std::int64_t received)
      : context_(context),
        params_(params),
        received_(received),
        padded_(params.groups.group_offsets[params.shape.num_local_experts]),
        stores_(choose_stores(padded_ * params.x_bytes)) {}

  void run() {
    const std::int64_t bytes = padded_ * (params_.x_bytes + params_.scale_bytes);
    for_rows(context_, params_.call, received_, bytes,
             [&](std::int64_t row, std::vector<std::int32_t>& to) { copy(row, to); });
    for_rows(context_, params_.call, padded_, bytes,
             [&](std::int64_t row, std::vector<std::int32_t>&) { clear_padding(row); });
  }

 private:
  void copy(std::int64_t row, std::vector<std::int32_t>& to) {
    const std::int64_t topk = params_.shape.num_topk;
    find_grouped_rows(params_.groups.grouped_rows + row * topk, topk, to);
    // Read once, written to every place.
    constexpr std::size_t kTogether = 32;
    std::byte* places[kTogether];
    for (std::size_t begin = 0; begin < to.size(); begin += kTogether) {
      const std::size_t count = std::min(kTogether, to.size() - begin);
      for (std::size_t i = 0; i < count; ++i) {
        places[i] = params_.grouped_x + to[begin + i] * params_.x_bytes;
      }
      copy_row(places, static_cast<int>(count), params_.x + row * params_.x_bytes, params_.x_bytes,
               stores_);
    }
    if (params_.scale_bytes == 0) return;
    for (const std::int32_t at : to) {
      std::memcpy(params_.grouped_x_scales + at * params_.scale_bytes,
                  params_.scales + row * params_.scale_bytes, params_.scale_bytes);
    }
  }

  void clear_padding(std::int64_t row) {
    if (params_.groups.recv_rows[row] >= 0) return;
    std::memset(params_.grouped_x + row * params_.x_bytes, 0, params_.x_bytes);
    if (params_.scale_bytes == 0) return;
    std::memset(params_.grouped_x_scales + row * params_.scale_bytes, 0, params_.scale_bytes);
  }

  Context& context_;
  const GroupParams& params_;
  const std::int64_t received_;
  const std::int64_t padded_;  // rows of all groups
  const Stores stores_;
};

}  // namespace

void group_rows(Context& context, const GroupParams& params) {
  const std::int64_t received = *params.num_received_rows;
  if (params.known) {
    check_groups(params, received);
  } else if (params.recv_topk_idx.dtype == DType::kInt64) {
    find_groups<std::int64_t>(params, received, context.global_rank());
  } else {
    find_groups<std::int32_t>(params, received, context.global_rank());
  }
  Expansion(context, params, received).run();
}

void reduce_rows(Context& context, const ReduceParams& params) {
  const std::int64_t received = *params.num_received_rows;
  require(params.num_rows >= received,
          "groups.grouped_rows has {} rows, but {} were received by the handle", params.num_rows,
          received);
  check_grouped_rows(params.grouped_rows, received, params.num_topk, params.num_grouped_rows);
  const std::int64_t row_bytes = params.hidden * static_cast<std::int64_t>(size_of(params.dtype));
  const Stores stores = choose_stores(received * row_bytes);
  for_rows(context, params.call, received, received * row_bytes,
           [&](std::int64_t row, std::vector<std::int32_t>& own) {
             find_grouped_rows(params.grouped_rows + row * params.num_topk, params.num_topk, own);
             std::vector<const std::byte*> sources;
             std::vector<float> weights;
             for (const std::int32_t at : own) {
               sources.push_back(params.x + at * row_bytes);
               if (params.weights != nullptr) weights.push_back(params.weights[at]);
             }
             SumPiece job;
             job.dtype = params.dtype;
             job.count = params.hidden;
             job.sources = sources.data();
             job.num_sources = static_cast<int>(sources.size());
             job.weights = params.weights == nullptr ? nullptr : weights.data();
             job.out = params.reduced + row * row_bytes;
             sum_piece(job, stores);
           });
}

}  // namespace deep_ep::host::intranode
