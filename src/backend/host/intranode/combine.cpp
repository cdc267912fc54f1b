#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/host/intranode/checks.hpp"
#include "backend/host/intranode/pieces.hpp"
#include "backend/host/intranode/steps.hpp"
#include "plan/layout.hpp"

namespace deep_ep::host::intranode {

using deep_ep::intranode::CombineParams;

namespace {

/// Copies this rank's outputs, if they are few, to where the peers have them mapped: then they need
/// no system call to read them, and this rank need not wait until they have. (I3 holds for this
/// memory as for the mailboxes.)
bool stage_outputs(Context& context, const CombineParams& params) {
  if (!context.pulls()) return false;
  const Pieces pieces(params, 64);
  const StagedOutputs staged = staged_outputs(context, params, pieces, context.rank());
  if (staged.bytes > context.staging_bytes()) return false;
  const int num_ranks = context.num_ranks();
  const auto own =
      plan::rows_from(params.rank_prefix_matrix, context.rank(), context.rank(), num_ranks);
  const std::int64_t rows =
      plan::received_rows(params.rank_prefix_matrix, context.rank(), num_ranks);
  const auto copy_rows = [&](std::int64_t begin, std::int64_t end) {
    if (begin == end) return;
    std::memcpy(staged.x + begin * pieces.x_bytes, params.x + begin * pieces.x_bytes,
                (end - begin) * pieces.x_bytes);
    if (pieces.weights_bytes == 0) return;
    const std::int64_t topk = params.call.record.num_topk;
    std::copy(params.topk_weights + begin * topk, params.topk_weights + end * topk,
              staged.topk_weights + begin * topk);
  };
  // Own rows are read where they are.
  copy_rows(0, own.begin);
  copy_rows(own.end, rows);
  return true;
}

/// Outputs that were computed in results of a dispatch lie in memory that all map.
protocol::OutputsPlace place_outputs(Context& context, const CombineParams& params, bool staged) {
  const Pieces pieces(params, 64);
  const std::int64_t rows =
      plan::received_rows(params.rank_prefix_matrix, context.rank(), context.num_ranks());
  const auto place = [&](const void* array, std::int64_t row_bytes) {
    const fabric::Fabric::Spot spot = context.fabric().locate(array, rows * row_bytes);
    return protocol::OutputsPlace::Array{static_cast<const std::byte*>(array), spot.segment,
                                         spot.offset};
  };
  return {place(params.x, pieces.x_bytes), place(params.topk_weights, pieces.weights_bytes),
          staged};
}

}  // namespace

StagedOutputs staged_outputs(Context& context, const CombineParams& params, const Pieces& pieces,
                             int rank) {
  const std::int64_t rows =
      plan::received_rows(params.rank_prefix_matrix, rank, context.num_ranks());
  const std::int64_t x_bytes = (rows * pieces.x_bytes + 63) / 64 * 64;
  std::byte* base = context.staging(rank, params.call);
  return {base, reinterpret_cast<float*>(base + x_bytes), x_bytes + rows * pieces.weights_bytes};
}

void cached_notify_combine(Context& context, const CombineParams& params) {
  check_handle({params.rank_prefix_matrix, params.send_head, params.call.record.num_tokens},
               context.rank(), context.num_ranks());
  check_rows(params, context.rank(), context.num_ranks());
  const bool staged = stage_outputs(context, params);
  // The caller may have written x past the caches.
  finish_stores();
  const protocol::OutputsPlace place = place_outputs(context, params, staged);
  for (int i = 0; i < context.num_ranks(); ++i) {
    context.mailbox_of(i, params.call).outputs[context.rank()] = place;
  }
  context.post(params.call);
}

void combine(Context& context, const CombineParams& params) {
  if (context.pulls()) {
    combine_pull(context, params);
  } else {
    combine_ring(context, params);
  }
}

void sum_token_piece(const CombineParams& params, const Pieces& pieces, const Pieces::Piece& piece,
                     std::int64_t token, const std::vector<const std::byte*>& sources,
                     Stores stores) {
  SumPiece job;
  job.sources = sources.data();
  job.num_sources = static_cast<int>(sources.size());
  const std::int64_t at = token * pieces.row_bytes(piece) + piece.offset;
  if (piece.is_weights) {
    job.dtype = DType::kFloat32;
    job.out = reinterpret_cast<std::byte*>(params.combined_topk_weights) + at;
  } else {
    job.dtype = params.dtype;
    job.out = params.combined_x + at;
    for (int b = 0; b < 2; ++b) {
      if (params.bias[b] != nullptr) job.bias[b] = params.bias[b] + at;
    }
  }
  job.count = piece.bytes / static_cast<std::int64_t>(size_of(job.dtype));
  sum_piece(job, stores);
}

}  // namespace deep_ep::host::intranode
