#include <algorithm>
#include <cstring>

#include "backend/host/intranode/checks.hpp"
#include "backend/host/intranode/steps.hpp"
#include "backend/host/landing.hpp"
#include "backend/host/rows.hpp"
#include "base/error.hpp"
#include "plan/layout.hpp"
#include "protocol/ticket.hpp"

namespace deep_ep::host::intranode {

using deep_ep::intranode::DispatchParams;

namespace {

// A thread's share of work is handed out in so many tokens: large enough to keep rows of one
// destination together, small enough that threads end together.
constexpr std::int64_t kTokensPerTicket = 16;
// Less than this per thread is done before another thread has woken up.
constexpr std::int64_t kBytesPerThread = 512 << 10;

/// One dispatch of this rank: where the rows of each receiver go.
class Dispatch {
 public:
  Dispatch(Context& context, const DispatchParams& params)
      : context_(context), params_(params), landing_(context, params) {}

  void run() {
    if (params_.cached) {
      check_handle({params_.rank_prefix_matrix, params_.send_head, num_tokens()}, context_.rank(),
                   context_.num_ranks());
      check_prepared_routing(params_.call, params_.source.topk_idx, context_.num_ranks(),
                             "handle.send_head", "-1", [&](std::int64_t token, std::int64_t rank) {
                               return params_.send_head[token * context_.num_ranks() + rank] >= 0;
                             });
      check_room();
    }
    landing_.publish_places();
    if (params_.cached) {
      context_.post(params_.call);
      context_.wait_posted(params_.call, params_.wait_stats);
    }
    landing_.find_places();
    find_slots();
    send_rows();
    landing_.publish_landed();
    landing_.fill_unused_rows(received_rows());
    landing_.wait_landed();
    copy_bookkeeping();
    landing_.copy_outputs(received_rows());
  }

 private:
  std::int64_t num_tokens() const { return params_.call.record.num_tokens; }
  std::int64_t received_rows() const {
    return plan::received_rows(params_.rank_prefix_matrix, context_.rank(), context_.num_ranks());
  }

  void check_room() const {
    const std::int64_t rows = received_rows();
    require(rows <= params_.block_rows,
            "there is room for {} rows by the handle or prepared.num_recv_tokens, but {} are "
            "received by rank_prefix_matrix",
            params_.block_rows, rows);
  }

  /// Of this rank's rows at each receiver.
  void find_slots() {
    for (int rank = 0; rank < context_.num_ranks(); ++rank) {
      first_slots_.push_back(
          plan::rows_from(params_.rank_prefix_matrix, context_.rank(), rank, context_.num_ranks())
              .begin);
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

  /// Only this rank writes these slots, behind the acquire in find_places() (I5).
  void send_token(std::int64_t token, std::vector<std::byte*>& rows) {
    const int num_ranks = context_.num_ranks();
    const std::int64_t x_bytes = params_.format.x_bytes;
    int num_rows = 0;
    for (int i = 0; i < num_ranks; ++i) {
      const int rank = context_.peer_in_turn(i);
      const std::int32_t head = params_.send_head[token * num_ranks + rank];
      if (head < 0) continue;
      protocol::schedule_point(protocol::Point::kCopy);
      const plan::RecvArrays& target = landing_.of(rank);
      const std::int64_t slot = first_slots_[rank] + head;
      rows[num_rows++] = target.x + slot * x_bytes;
      landing_.write_scales(token, target.scales + slot * params_.format.scale_bytes);
      landing_.write_topk(landing_.topk_of(token), landing_.weights_of(token), rank, target, slot);
      target.src_idx[slot] = static_cast<std::int32_t>(token);
    }
    copy_row(rows.data(), num_rows, params_.source.x + token * x_bytes, x_bytes, stores_);
  }

  void copy_bookkeeping() {
    if (params_.recv_src_idx == nullptr) return;
    const int num_ranks = context_.num_ranks();
    std::copy_n(landing_.of(context_.rank()).src_idx, params_.block_rows, params_.recv_src_idx);
    std::vector<std::int64_t> num_tokens(num_ranks);
    for (int i = 0; i < num_ranks; ++i) {
      num_tokens[i] = context_.mailbox_of(context_.rank(), params_.call).record[i].num_tokens;
    }
    plan::build_recv_channel_prefix_matrix(
        params_.rank_prefix_matrix, context_.rank(), num_ranks, params_.recv_src_idx,
        num_tokens.data(), params_.num_channels, params_.recv_channel_prefix_matrix);
  }

  Context& context_;
  const DispatchParams& params_;
  Landing landing_;
  std::vector<std::int64_t> first_slots_;  // by receiver
  protocol::TicketCounter tickets_{};
  Stores stores_ = Stores::kCached;
};

}  // namespace

void dispatch(Context& context, const DispatchParams& params) { Dispatch(context, params).run(); }

}  // namespace deep_ep::host::intranode
