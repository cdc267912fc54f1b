#pragma once

#include <cstdint>
#include <vector>

#include "backend/host/context.hpp"
#include "backend/params.hpp"

namespace deep_ep::host {

/// How rows of a dispatch get to their slots in the results of the ranks of this node: where these
/// lie, and who has written all.
class Landing {
 public:
  Landing(Context& context, const DispatchStep& step)
      : context_(context), step_(step), arrays_(context.num_ranks()), room_(context.num_ranks()) {}

  /// Tells every rank of the node where this rank's results lie. Nobody reads the block (I6), and
  /// no sender reads the place of an earlier call any more (I4).
  void publish_places();
  /// Waits for the places of all.
  void find_places();
  const plan::RecvArrays& of(int rank) const { return arrays_[rank]; }
  /// Rows that the results of a rank of the node have room for.
  std::int64_t room(int rank) const { return room_[rank]; }

  // Of this rank's own token.
  const std::byte* topk_of(std::int64_t token) const {
    return step_.source.topk_idx.as<const std::byte>() + token * step_.format.topk_idx_bytes;
  }
  const float* weights_of(std::int64_t token) const {
    if (step_.source.topk_weights == nullptr) return nullptr;
    return step_.source.topk_weights + token * step_.call.record.num_topk;
  }
  void write_scales(std::int64_t token, std::byte* to) const;

  /// The token's K experts, as `receiver` (counted over all nodes) sees them: expert ids become
  /// local ones, entries for experts of other ranks -1 with weight 0.
  void write_topk(const std::byte* topk_idx, const float* topk_weights, int receiver,
                  const plan::RecvArrays& to, std::int64_t slot) const;

  /// release: every row that this rank writes is written (finish_stores() and the pool's join come
  /// before).
  void publish_landed();
  /// Behind the `rows` rows that come.
  void fill_unused_rows(std::int64_t rows);
  void wait_landed();
  /// To memory that peers could not write: the `rows` rows that came, and all of what is filled up.
  void copy_outputs(std::int64_t rows);

 private:
  template <class Id>
  void write_topk_as(const Id* ids, const float* topk_weights, int receiver,
                     const plan::RecvArrays& to, std::int64_t slot) const;

  Context& context_;
  const DispatchStep& step_;
  std::vector<plan::RecvArrays> arrays_;  // by rank
  std::vector<std::int64_t> room_;        // by rank
};

}  // namespace deep_ep::host
