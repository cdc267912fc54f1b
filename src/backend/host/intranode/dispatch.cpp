#include <algorithm>
#include <cstring>

#include "backend/host/intranode/checks.hpp"
#include "backend/host/intranode/steps.hpp"
#include "backend/host/rows.hpp"
#include "base/error.hpp"
#include "plan/layout.hpp"
#include "protocol/ticket.hpp"

namespace deep_ep::host::intranode {

using deep_ep::intranode::DispatchOutputs;
using deep_ep::intranode::DispatchParams;

namespace {

// A thread's share of work is handed out in so many tokens: large enough to keep rows of one
// destination together, small enough that threads end together.
constexpr std::int64_t kTokensPerTicket = 16;
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

/// One dispatch of this rank: where the rows of each receiver go.
class Dispatch {
 public:
  Dispatch(Context& context, const DispatchParams& params)
      : context_(context), params_(params), targets_(context.num_ranks()) {}

  void run() {
    if (params_.cached) {
      check_handle({params_.rank_prefix_matrix, params_.send_head, num_tokens()}, context_.rank(),
                   context_.num_ranks());
      check_prepared_routing(params_, context_.num_ranks());
      check_room();
    }
    publish_inbox();
    if (params_.cached) {
      context_.post(params_.call);
      context_.wait_posted(params_.call);
    }
    find_targets();
    send_rows();
    publish_landed();
    fill_unused_rows();
    wait_landed();
    copy_bookkeeping();
    copy_outputs();
  }

 private:
  struct Target {
    plan::RecvArrays arrays;
    std::int64_t first_slot;  // of this rank's rows
  };

  std::int64_t num_tokens() const { return params_.call.record.num_tokens; }

  void check_room() const {
    const std::int64_t rows =
        plan::received_rows(params_.rank_prefix_matrix, context_.rank(), context_.num_ranks());
    require(rows <= params_.block_rows,
            "there is room for {} rows by the handle or prepared.num_recv_tokens, but {} are "
            "received by rank_prefix_matrix",
            params_.block_rows, rows);
  }

  /// Tells every sender where this rank's results lie. Nobody reads the block (I6), and no sender
  /// reads the place of an earlier call any more (I4).
  void publish_inbox() {
    for (int i = 0; i < context_.num_ranks(); ++i) {
      const int source = context_.peer_in_turn(i);
      protocol::InboxPlace& place = context_.peer(source).inbox[context_.rank()];
      place.segment = params_.block.segment;
      place.offset = params_.block.offset;
      place.rows = params_.block_rows;
      place.x_segment = params_.x_block.segment;
      place.x_offset = params_.x_block.offset;
      place.ready.publish(params_.call.epoch);
      context_.ring_doorbell(source);
    }
  }

  void find_targets() {
    const protocol::InboxPlace* places = context_.own().inbox;
    std::byte* base = nullptr;
    std::byte* x_base = nullptr;
    for (int i = 0; i < context_.num_ranks(); ++i) {
      const int rank = context_.peer_in_turn(i);
      const protocol::InboxPlace& place = places[rank];
      context_.wait(
          params_.call, "the place of its results",
          [&] {
            // acquire: pairs with publish_inbox() of the receiver.
            if (!place.ready.reached(params_.call.epoch)) return false;
            base = context_.fabric().base(rank, place.segment);
            x_base = place.x_segment < 0 ? nullptr : context_.fabric().base(rank, place.x_segment);
            return base != nullptr && (place.x_segment < 0 || x_base != nullptr);
          },
          [&] {
            return std::vector<Missing>{{rank, params_.call.epoch, place.ready.seen()}};
          });
      Carver carver(base + place.offset);
      targets_[rank].arrays =
          plan::RecvArrays::carve(carver, params_.format, place.rows,
                                  x_base == nullptr ? nullptr : x_base + place.x_offset);
      targets_[rank].first_slot =
          plan::rows_from(params_.rank_prefix_matrix, context_.rank(), rank, context_.num_ranks())
              .begin;
    }
  }

  void send_rows() {
    const std::int64_t row_bytes = params_.format.x_bytes + params_.format.scale_bytes;
    std::int64_t rows = 0;
    for (int i = 0; i < context_.num_ranks(); ++i) {
      const auto range =
          plan::rows_from(params_.rank_prefix_matrix, context_.rank(), i, context_.num_ranks());
      rows += range.end - range.begin;
    }
    stores_ = choose_stores(rows * row_bytes);
    const auto threads =
        std::clamp<std::int64_t>(rows * row_bytes / kBytesPerThread, 1,
                                 std::min(context_.pool().size(), params_.call.num_threads));
    context_.pool().run(static_cast<int>(threads), [&](int) {
      std::vector<std::byte*> rows_of_token(context_.num_ranks());
      for (;;) {
        const auto begin = static_cast<std::int64_t>(tickets_.take()) * kTokensPerTicket;
        if (begin >= num_tokens()) break;
        const std::int64_t end = std::min(begin + kTokensPerTicket, num_tokens());
        for (std::int64_t token = begin; token < end; ++token) send_token(token, rows_of_token);
      }
      finish_stores();
    });
  }

  /// Only this rank writes these slots, behind the acquire in find_targets() (I5).
  void send_token(std::int64_t token, std::vector<std::byte*>& rows) {
    const int num_ranks = context_.num_ranks();
    const std::int64_t x_bytes = params_.format.x_bytes;
    int num_rows = 0;
    for (int i = 0; i < num_ranks; ++i) {
      const int rank = context_.peer_in_turn(i);
      const std::int32_t head = params_.send_head[token * num_ranks + rank];
      if (head < 0) continue;
      protocol::schedule_point(protocol::Point::kCopy);
      const Target& target = targets_[rank];
      const std::int64_t slot = target.first_slot + head;
      rows[num_rows++] = target.arrays.x + slot * x_bytes;
      send_scales(token, target.arrays.scales + slot * params_.format.scale_bytes);
      send_topk(token, rank, target.arrays, slot);
      target.arrays.src_idx[slot] = static_cast<std::int32_t>(token);
    }
    copy_row(rows.data(), num_rows, params_.source.x + token * x_bytes, x_bytes, stores_);
  }

  void send_scales(std::int64_t token, std::byte* to) {
    const TensorView& scales = params_.source.scales;
    if (!scales.defined()) return;
    const auto* from = scales.as<const std::uint32_t>() + token * scales.strides[0];
    auto* out = reinterpret_cast<std::uint32_t*>(to);
    for (std::int64_t s = 0; s < scales.shape[1]; ++s) out[s] = from[s * scales.strides[1]];
  }

  void send_topk(std::int64_t token, int rank, const plan::RecvArrays& arrays, std::int64_t slot) {
    if (params_.format.topk_idx_bytes == 0) return;
    if (params_.source.topk_idx.dtype == DType::kInt64) {
      send_topk_as<std::int64_t>(token, rank, arrays, slot);
    } else {
      send_topk_as<std::int32_t>(token, rank, arrays, slot);
    }
  }

  /// Expert ids become local ones; entries for experts of other ranks become -1 with weight 0.
  template <class Id>
  void send_topk_as(std::int64_t token, int rank, const plan::RecvArrays& arrays,
                    std::int64_t slot) {
    const std::int64_t topk = params_.call.record.num_topk;
    const Id local_experts =
        static_cast<Id>(params_.call.record.num_experts / context_.num_ranks());
    const Id first = static_cast<Id>(rank) * local_experts;
    const Id* ids = params_.source.topk_idx.as<const Id>() + token * topk;
    Id* out = reinterpret_cast<Id*>(arrays.topk_idx) + slot * topk;
    const bool weighted = params_.format.topk_weights_bytes != 0;
    float* weights_out = reinterpret_cast<float*>(arrays.topk_weights) + slot * topk;
    for (std::int64_t k = 0; k < topk; ++k) {
      const bool here = ids[k] >= first && ids[k] < first + local_experts;
      out[k] = here ? ids[k] - first : Id{-1};
      if (weighted) weights_out[k] = here ? params_.source.topk_weights[token * topk + k] : 0.0f;
    }
  }

  /// release: every row of this rank is written (finish_stores() and the pool's join come before).
  void publish_landed() {
    for (int i = 0; i < context_.num_ranks(); ++i) {
      const int rank = context_.peer_in_turn(i);
      context_.peer(rank).landed[context_.rank()].publish(params_.call.epoch);
      context_.ring_doorbell(rank);
    }
  }

  void fill_unused_rows() {
    const std::int64_t rows =
        plan::received_rows(params_.rank_prefix_matrix, context_.rank(), context_.num_ranks());
    const std::int64_t unused = params_.block_rows - rows;
    const plan::RecvArrays& own = targets_[context_.rank()].arrays;
    std::memset(own.topk_idx + rows * params_.format.topk_idx_bytes, 0xff,
                unused * params_.format.topk_idx_bytes);
    std::memset(own.topk_weights + rows * params_.format.topk_weights_bytes, 0,
                unused * params_.format.topk_weights_bytes);
    std::fill_n(own.src_idx + rows, unused, -1);
  }

  void wait_landed() {
    // acquire: pairs with publish_landed() of each source.
    context_.wait_flags(params_.call, "its rows", context_.own().landed, context_.all_ranks(),
                        params_.wait_stats);
  }

  void copy_bookkeeping() {
    if (params_.recv_src_idx == nullptr) return;
    const int num_ranks = context_.num_ranks();
    std::copy_n(targets_[context_.rank()].arrays.src_idx, params_.block_rows, params_.recv_src_idx);
    std::vector<std::int64_t> num_tokens(num_ranks);
    for (int i = 0; i < num_ranks; ++i) {
      num_tokens[i] = context_.mailbox_of(context_.rank(), params_.call).record[i].num_tokens;
    }
    plan::build_recv_channel_prefix_matrix(
        params_.rank_prefix_matrix, context_.rank(), num_ranks, params_.recv_src_idx,
        num_tokens.data(), params_.num_channels, params_.recv_channel_prefix_matrix);
  }

  /// To memory that peers could not write: the rows that came, and all of what is filled up.
  void copy_outputs() {
    const DispatchOutputs& outputs = params_.outputs;
    const plan::RecvArrays& own = targets_[context_.rank()].arrays;
    const plan::RowFormat& format = params_.format;
    const std::int64_t rows =
        plan::received_rows(params_.rank_prefix_matrix, context_.rank(), context_.num_ranks());
    copy_array(context_, params_.call, outputs.x, own.x, rows * format.x_bytes);
    copy_array(context_, params_.call, outputs.scales, own.scales, rows * format.scale_bytes);
    copy_array(context_, params_.call, outputs.topk_idx, own.topk_idx,
               params_.block_rows * format.topk_idx_bytes);
    copy_array(context_, params_.call, outputs.topk_weights, own.topk_weights,
               params_.block_rows * format.topk_weights_bytes);
  }

  Context& context_;
  const DispatchParams& params_;
  std::vector<Target> targets_;
  protocol::TicketCounter tickets_{};
  Stores stores_ = Stores::kCached;
};

}  // namespace

void dispatch(Context& context, const DispatchParams& params) { Dispatch(context, params).run(); }

}  // namespace deep_ep::host::intranode
