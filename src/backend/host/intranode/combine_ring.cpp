#include <algorithm>
#include <memory>
#include <vector>

#include "backend/host/intranode/pieces.hpp"
#include "backend/host/intranode/steps.hpp"
#include "backend/host/lanes.hpp"
#include "backend/host/rows.hpp"
#include "plan/layout.hpp"

namespace deep_ep::host::intranode {

using deep_ep::intranode::CombineParams;

namespace {

constexpr std::int64_t align64(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

/// The share of a combine that one thread does alone: the same contiguous share of every source's
/// tokens on all ranks. It sends this rank's rows home and sums what comes home here, a little of
/// each in turn, so that two ranks never wait for each other with full rings.
class Lane {
 public:
  Lane(Context& context, const CombineParams& params, const Pieces& pieces, int lane)
      : context_(context),
        params_(params),
        pieces_(pieces),
        lane_(lane),
        token_(own_begin(lane)),
        token_end_(own_begin(lane + 1)),
        outgoing_(context.num_ranks()),
        agreed_(context.num_ranks(), false),
        unreturned_(context.num_ranks(), false),
        stores_(choose_stores(params.call.record.num_tokens * pieces.x_bytes)) {}

  bool done() const { return sent_ && token_ == token_end_; }

  /// Moves what can be moved now; false if nothing could.
  bool step() {
    bool moved = false;
    sent_ = true;
    for (int i = 0; i + 1 < context_.num_ranks(); ++i) {
      const int source = context_.peer_in_turn(i);
      moved |= send_to(source);
      sent_ = sent_ && outgoing_[source].state == Outgoing::kSent;
    }
    for (int i = 0; i < kRowsPerStep && token_ < token_end_ && sum_token(); ++i) moved = true;
    return_credits();
    return moved;
  }

  /// Who keeps this lane from moving.
  std::vector<Missing> missing() {
    std::vector<Missing> list;
    for (int i = 0; i < context_.num_ranks(); ++i) {
      if (i == context_.rank()) continue;
      const protocol::RingSender& to = context_.ring_to(lane_, i);
      const protocol::RingReceiver& from = context_.ring_from(lane_, i);
      if (outgoing_[i].state == Outgoing::kSending) {
        list.push_back({i, to.written, to.freed});
      } else if (outgoing_[i].state == Outgoing::kUnknown || awaits(i)) {
        list.push_back({i, from.consumed + 1, from.arrived});
      }
    }
    return list;
  }

  /// True if the next sum needs a row of `rank` that is not here.
  bool awaits(int rank) {
    if (rank == context_.rank() || token_ == token_end_) return false;
    if (params_.send_head[token_ * context_.num_ranks() + rank] < 0) return false;
    const Pieces::Piece piece = pieces_.piece(piece_);
    return context_.ring_from(lane_, rank).peek(align64(piece.bytes)) == nullptr;
  }

 private:
  struct Outgoing {
    enum State { kUnknown, kSending, kSent };
    State state = kUnknown;
    std::int64_t row = 0;
    std::int64_t row_end = 0;
    int piece = 0;
    bool unpublished = false;
  };

  std::int64_t own_begin(int lane) const {
    return plan::channel_begin(params_.call.record.num_tokens, lane, context_.num_lanes());
  }

  /// Nothing of a rank is used before its call was compared with ours (I9).
  bool agreed(int rank) {
    if (agreed_[rank]) return true;
    if (!context_.posted(params_.call, rank)) return false;
    context_.check_agreement(params_.call, rank);
    agreed_[rank] = true;
    return true;
  }

  /// Which of this rank's received rows are of the source's tokens in this lane; needs the source's
  /// number of tokens.
  void find_rows(int source, Outgoing& out) {
    const auto rows =
        plan::rows_from(params_.rank_prefix_matrix, source, context_.rank(), context_.num_ranks());
    const std::int64_t tokens =
        context_.mailbox_of(context_.rank(), params_.call).record[source].num_tokens;
    const auto row_of = [&](int lane) {
      const std::int64_t first = plan::channel_begin(tokens, lane, context_.num_lanes());
      return std::lower_bound(params_.recv_src_idx + rows.begin, params_.recv_src_idx + rows.end,
                              first) -
             params_.recv_src_idx;
    };
    out.row = row_of(lane_);
    out.row_end = row_of(lane_ + 1);
    out.state = out.row == out.row_end ? Outgoing::kSent : Outgoing::kSending;
  }

  bool send_to(int source) {
    Outgoing& out = outgoing_[source];
    if (out.state == Outgoing::kSent) return false;
    if (out.state == Outgoing::kUnknown) {
      if (!agreed(source)) return false;
      find_rows(source, out);
      if (out.state == Outgoing::kSent) return true;
    }
    protocol::RingSender& ring = context_.ring_to(lane_, source);
    const std::int64_t window = params_.window_rows * (pieces_.weights_bytes + pieces_.x_bytes);
    bool moved = false;
    for (int rows = 0; rows < kRowsPerStep && out.row < out.row_end;) {
      const Pieces::Piece piece = pieces_.piece(out.piece);
      if (!within(ring, window) || !write(ring, out.row, piece)) break;
      moved = true;
      out.unpublished = true;
      if (++out.piece < pieces_.count()) continue;
      out.piece = 0;
      ++out.row;
      if (++rows % params_.chunk_rows == 0) publish(ring, source, out);
    }
    if (out.row == out.row_end) out.state = Outgoing::kSent;
    publish(ring, source, out);
    return moved;
  }

  /// Config's bound on rows in flight; the ring's own bound comes on top.
  static bool within(protocol::RingSender& ring, std::int64_t window) {
    if (static_cast<std::int64_t>(ring.written - ring.freed) < window) return true;
    ring.refresh_credits();
    return static_cast<std::int64_t>(ring.written - ring.freed) < window;
  }

  bool write(protocol::RingSender& ring, std::int64_t row, const Pieces::Piece& piece) {
    const std::int64_t record = align64(piece.bytes);
    std::byte* to = ring.reserve(record);
    if (to == nullptr) return false;
    protocol::schedule_point(protocol::Point::kCopy);
    // Cached stores: the source reads the record soon, from the last-level cache.
    copy_row(to, row_piece(row, piece), piece.bytes, Stores::kCached);
    ring.advance(record);
    return true;
  }

  /// release: pairs with the acquire in RingReceiver::peek() at the source.
  void publish(protocol::RingSender& ring, int source, Outgoing& out) {
    if (!out.unpublished) return;
    ring.publish();
    out.unpublished = false;
    context_.ring_doorbell(source);
  }

  const std::byte* row_piece(std::int64_t row, const Pieces::Piece& piece) const {
    const std::byte* rows =
        piece.is_weights ? reinterpret_cast<const std::byte*>(params_.topk_weights) : params_.x;
    return pieces_.at(rows, row, piece);
  }

  /// Sums the pieces of token_ whose contributions are all here; true when the token is complete.
  bool sum_token() {
    for (; piece_ < pieces_.count(); ++piece_) {
      const Pieces::Piece piece = pieces_.piece(piece_);
      if (!gather(piece)) return false;
      sum_token_piece(params_, pieces_, piece, token_, sources_, stores_);
      for (const int rank : ranks_) {
        context_.ring_from(lane_, rank).advance(align64(piece.bytes));
        unreturned_[rank] = true;
      }
    }
    piece_ = 0;
    ++token_;
    return true;
  }

  /// Finds the token's contributions in ascending rank.
  bool gather(const Pieces::Piece& piece) {
    const int num_ranks = context_.num_ranks();
    sources_.clear();
    ranks_.clear();
    for (int rank = 0; rank < num_ranks; ++rank) {
      const std::int32_t head = params_.send_head[token_ * num_ranks + rank];
      if (head < 0) continue;
      if (rank == context_.rank()) {
        const auto own = plan::rows_from(params_.rank_prefix_matrix, rank, rank, num_ranks);
        sources_.push_back(row_piece(own.begin + head, piece));
        continue;
      }
      if (!agreed(rank)) return false;
      const std::byte* record = context_.ring_from(lane_, rank).peek(align64(piece.bytes));
      if (record == nullptr) return false;
      sources_.push_back(record);
      ranks_.push_back(rank);
    }
    return true;
  }

  void return_credits() {
    for (int rank = 0; rank < context_.num_ranks(); ++rank) {
      if (!unreturned_[rank]) continue;
      context_.ring_from(lane_, rank).release();
      unreturned_[rank] = false;
      context_.ring_doorbell(rank);
    }
  }

  Context& context_;
  const CombineParams& params_;
  const Pieces& pieces_;
  const int lane_;
  std::int64_t token_;
  const std::int64_t token_end_;
  int piece_ = 0;
  bool sent_ = false;
  std::vector<Outgoing> outgoing_;  // by source
  std::vector<bool> agreed_;        // by rank
  std::vector<bool> unreturned_;    // by rank: credits that it does not have back yet
  const Stores stores_;
  std::vector<const std::byte*> sources_;
  std::vector<int> ranks_;
};

}  // namespace

void combine_ring(Context& context, const CombineParams& params) {
  // A record fits the ring.
  const Pieces pieces(params, context.ring_to(0, 0).shape.max_record());
  std::vector<Lane> lanes;
  for (int i = 0; i < context.num_lanes(); ++i) lanes.emplace_back(context, params, pieces, i);

  const WaitTimes times = run_all_lanes(lanes, context.num_ranks(), context, params.call);
  context.wait_posted(params.call);
  times.add_to(params.wait_stats);
}

}  // namespace deep_ep::host::intranode
