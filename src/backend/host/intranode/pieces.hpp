#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/host/context.hpp"
#include "backend/host/rows.hpp"
#include "backend/params.hpp"

namespace deep_ep::host::intranode {

/// How a row of a combine comes home: whole if it is at most max_bytes long, else in pieces,
/// weights first. The same on all ranks.
struct Pieces {
  std::int64_t weights_bytes;
  std::int64_t x_bytes;
  std::int64_t max_bytes;

  struct Piece {
    bool is_weights;
    std::int64_t offset;  // bytes from the beginning of the row
    std::int64_t bytes;
  };

  /// `max_bytes`, rounded down so that a piece holds whole elements and whole cache lines.
  Pieces(const CombineStep& step, std::int64_t most)
      // From the record, which is the same on all ranks: a rank without rows may pass a null
      // pointer.
      : weights_bytes(
            step.call.record.has_topk_weights ? step.call.record.num_topk * std::int64_t{4} : 0),
        x_bytes(step.call.record.hidden * static_cast<std::int64_t>(size_of(step.dtype))),
        max_bytes(std::max<std::int64_t>(most / 64, 1) * 64) {}

  int num_weights() const { return static_cast<int>((weights_bytes + max_bytes - 1) / max_bytes); }
  int count() const {
    return num_weights() + static_cast<int>((x_bytes + max_bytes - 1) / max_bytes);
  }
  Piece piece(int index) const {
    const bool is_weights = index < num_weights();
    const std::int64_t offset = (is_weights ? index : index - num_weights()) * max_bytes;
    return {is_weights, offset,
            std::min(max_bytes, (is_weights ? weights_bytes : x_bytes) - offset)};
  }
  std::int64_t row_bytes(const Piece& piece) const {
    return piece.is_weights ? weights_bytes : x_bytes;
  }
  /// Where a piece of row `row` lies if the rows of its array begin at `rows`.
  const std::byte* at(const std::byte* rows, std::int64_t row, const Piece& piece) const {
    return rows + row * row_bytes(piece) + piece.offset;
  }
};

/// The outputs of `rank` where its peers have them mapped, if they were put there.
struct StagedOutputs {
  std::byte* x;
  float* topk_weights;
  std::int64_t bytes;  // of both
};
StagedOutputs staged_outputs(Context& context, const deep_ep::intranode::CombineParams& params,
                             const Pieces& pieces, int rank);

/// Sums one piece of a token's row from `sources`, which are in ascending rank.
void sum_token_piece(const deep_ep::intranode::CombineParams& params, const Pieces& pieces,
                     const Pieces::Piece& piece, std::int64_t token,
                     const std::vector<const std::byte*>& sources, Stores stores);

}  // namespace deep_ep::host::intranode
