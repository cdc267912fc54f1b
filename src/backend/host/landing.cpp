#include "backend/host/landing.hpp"

#include <algorithm>
#include <cstring>

namespace deep_ep::host {

namespace {

// Less than this per thread is done before another thread has woken up.
constexpr std::int64_t kBytesPerThread = 512 << 10;

/// Nothing if `to` is null.
void copy_array(Context& context, const Call& call, std::byte* to, const std::byte* from,
                std::int64_t bytes) {
  if (to == nullptr || bytes == 0) return;
  const auto threads = std::clamp<std::int64_t>(bytes / kBytesPerThread, 1,
                                                std::min(context.pool().size(), call.num_threads));
  context.pool().run(static_cast<int>(threads), [&](int thread) {
    const std::int64_t begin = bytes / threads * thread;
    std::memcpy(to + begin, from + begin,
                (thread + 1 == threads ? bytes : begin + bytes / threads) - begin);
  });
}

}  // namespace

void Landing::publish_places() {
  for (int i = 0; i < context_.num_ranks(); ++i) {
    const int source = context_.peer_in_turn(i);
    protocol::InboxPlace& place = context_.peer(source).inbox[context_.rank()];
    place.segment = step_.block.segment;
    place.offset = step_.block.offset;
    place.rows = step_.block_rows;
    place.x_segment = step_.x_block.segment;
    place.x_offset = step_.x_block.offset;
    place.ready.publish(step_.call.epoch);
    context_.ring_doorbell(source);
  }
}

void Landing::find_places() {
  const protocol::InboxPlace* places = context_.own().inbox;
  std::byte* base = nullptr;
  std::byte* x_base = nullptr;
  for (int i = 0; i < context_.num_ranks(); ++i) {
    const int rank = context_.peer_in_turn(i);
    const protocol::InboxPlace& place = places[rank];
    context_.wait(
        step_.call, "the place of its results",
        [&] {
          // acquire: pairs with publish_places() of the receiver.
          if (!place.ready.reached(step_.call.epoch)) return false;
          base = context_.segment_base(step_.call, rank, place.segment);
          x_base = place.x_segment < 0 ? nullptr
                                       : context_.segment_base(step_.call, rank, place.x_segment);
          return base != nullptr && (place.x_segment < 0 || x_base != nullptr);
        },
        [&] {
          return std::vector<Missing>{
              {context_.global_rank(rank), step_.call.epoch, place.ready.seen()}};
        });
    Carver carver(base + place.offset);
    room_[rank] = place.rows;
    arrays_[rank] = plan::RecvArrays::carve(carver, step_.format, place.rows,
                                            x_base == nullptr ? nullptr : x_base + place.x_offset);
  }
}

void Landing::write_scales(std::int64_t token, std::byte* to) const {
  const TensorView& scales = step_.source.scales;
  if (!scales.defined()) return;
  const auto* from = scales.as<const std::uint32_t>() + token * scales.strides[0];
  auto* out = reinterpret_cast<std::uint32_t*>(to);
  for (std::int64_t s = 0; s < scales.shape[1]; ++s) out[s] = from[s * scales.strides[1]];
}

void Landing::write_topk(const std::byte* topk_idx, const float* topk_weights, int receiver,
                         const plan::RecvArrays& to, std::int64_t slot) const {
  if (step_.format.topk_idx_bytes == 0) return;
  if (step_.call.record.topk_dtype == static_cast<std::int32_t>(DType::kInt64)) {
    write_topk_as(reinterpret_cast<const std::int64_t*>(topk_idx), topk_weights, receiver, to,
                  slot);
  } else {
    write_topk_as(reinterpret_cast<const std::int32_t*>(topk_idx), topk_weights, receiver, to,
                  slot);
  }
}

template <class Id>
void Landing::write_topk_as(const Id* ids, const float* topk_weights, int receiver,
                            const plan::RecvArrays& to, std::int64_t slot) const {
  const std::int64_t topk = step_.call.record.num_topk;
  const Id local_experts =
      static_cast<Id>(step_.call.record.num_experts / context_.topology().num_ranks);
  const Id first = static_cast<Id>(receiver) * local_experts;
  Id* out = reinterpret_cast<Id*>(to.topk_idx) + slot * topk;
  const bool weighted = step_.format.topk_weights_bytes != 0;
  float* weights_out = reinterpret_cast<float*>(to.topk_weights) + slot * topk;
  for (std::int64_t k = 0; k < topk; ++k) {
    const bool here = ids[k] >= first && ids[k] < first + local_experts;
    out[k] = here ? ids[k] - first : Id{-1};
    if (weighted) weights_out[k] = here ? topk_weights[k] : 0.0f;
  }
}

void Landing::publish_landed() {
  for (int i = 0; i < context_.num_ranks(); ++i) {
    const int rank = context_.peer_in_turn(i);
    context_.peer(rank).landed[context_.rank()].publish(step_.call.epoch);
    context_.ring_doorbell(rank);
  }
}

void Landing::fill_unused_rows(std::int64_t rows) {
  const std::int64_t unused = step_.block_rows - rows;
  const plan::RecvArrays& own = arrays_[context_.rank()];
  std::memset(own.topk_idx + rows * step_.format.topk_idx_bytes, 0xff,
              unused * step_.format.topk_idx_bytes);
  std::memset(own.topk_weights + rows * step_.format.topk_weights_bytes, 0,
              unused * step_.format.topk_weights_bytes);
  std::fill_n(own.src_idx + rows, unused, -1);
  std::memset(own.src_meta + rows * step_.format.src_meta_bytes, 0xff,
              unused * step_.format.src_meta_bytes);
}

void Landing::wait_landed() {
  // acquire: pairs with publish_landed() of each source.
  context_.wait_flags(step_.call, "its rows", context_.own().landed, context_.all_ranks(),
                      step_.wait_stats);
}

void Landing::copy_outputs(std::int64_t rows) {
  const DispatchOutputs& outputs = step_.outputs;
  const plan::RecvArrays& own = arrays_[context_.rank()];
  const plan::RowFormat& format = step_.format;
  copy_array(context_, step_.call, outputs.x, own.x, rows * format.x_bytes);
  copy_array(context_, step_.call, outputs.scales, own.scales, rows * format.scale_bytes);
  copy_array(context_, step_.call, outputs.topk_idx, own.topk_idx,
             step_.block_rows * format.topk_idx_bytes);
  copy_array(context_, step_.call, outputs.topk_weights, own.topk_weights,
             step_.block_rows * format.topk_weights_bytes);
}

}  // namespace deep_ep::host
