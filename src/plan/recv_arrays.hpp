#pragma once

#include <cstddef>
#include <cstdint>

#include "base/carver.hpp"

namespace deep_ep::plan {

/// What one received row carries, in bytes per array; the same on all ranks (checked before data
/// moves).
struct RowFormat {
  std::int64_t x_bytes = 0;
  std::int64_t scale_bytes = 0;         // 0: no scales
  std::int64_t topk_idx_bytes = 0;      // 0: no topk
  std::int64_t topk_weights_bytes = 0;  // 0: no weights
  std::int64_t src_meta_bytes = 0;      // several nodes: SourceMeta, else 0

  DEEP_EP_HD RowFormat without_x() const {
    return {0, scale_bytes, topk_idx_bytes, topk_weights_bytes, src_meta_bytes};
  }

  friend bool operator==(const RowFormat&, const RowFormat&) = default;
};

/// The block of one dispatch's results in the receiver's segment: one array a payload, a row each.
/// Senders and receiver carve it with the same function, so a base address and a row count place
/// every row.
struct RecvArrays {
  std::byte* x;
  std::byte* scales;
  std::byte* topk_idx;
  std::byte* topk_weights;
  std::int32_t* src_idx;
  std::byte* src_meta;

  /// `x`, unless null, is where the rows of x lie, which are not in the block then.
  DEEP_EP_HD static RecvArrays carve(Carver& carver, const RowFormat& format, std::int64_t rows,
                                     std::byte* x = nullptr) {
    RecvArrays arrays;
    arrays.x = x != nullptr ? x : carver.take<std::byte>(rows * format.x_bytes);
    arrays.scales = carver.take<std::byte>(rows * format.scale_bytes);
    arrays.topk_idx = carver.take<std::byte>(rows * format.topk_idx_bytes);
    arrays.topk_weights = carver.take<std::byte>(rows * format.topk_weights_bytes);
    arrays.src_idx = carver.take<std::int32_t>(rows);
    arrays.src_meta = carver.take<std::byte>(rows * format.src_meta_bytes);
    return arrays;
  }

  DEEP_EP_HD static std::int64_t bytes(const RowFormat& format, std::int64_t rows) {
    Carver carver(nullptr);
    (void)carve(carver, format, rows);
    return carver.used();
  }
};

/// What of a dispatch's handle depends on the received rows: a block of its own, since a handle
/// outlives the rows.
struct HandleArrays {
  std::int32_t* recv_src_idx;                // [rows]
  std::int32_t* recv_channel_prefix_matrix;  // [R, C]

  DEEP_EP_HD static HandleArrays carve(Carver& carver, std::int64_t rows, int num_ranks,
                                       int num_channels) {
    HandleArrays arrays;
    arrays.recv_src_idx = carver.take<std::int32_t>(rows);
    arrays.recv_channel_prefix_matrix =
        carver.take<std::int32_t>(std::int64_t{num_ranks} * num_channels);
    return arrays;
  }

  static std::int64_t bytes(std::int64_t rows, int num_ranks, int num_channels) {
    Carver carver(nullptr);
    (void)carve(carver, rows, num_ranks, num_channels);
    return carver.used();
  }
};

}  // namespace deep_ep::plan
