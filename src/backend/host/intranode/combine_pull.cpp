#include <fmt/format.h>

#include <algorithm>
#include <system_error>
#include <vector>

#include "backend/host/intranode/pieces.hpp"
#include "backend/host/intranode/steps.hpp"
#include "backend/host/rows.hpp"
#include "plan/layout.hpp"

namespace deep_ep::host::intranode {

using deep_ep::intranode::CombineParams;

namespace {

// Less than this per thread is done before another thread has woken up.
constexpr std::int64_t kBytesPerThread = 512 << 10;

constexpr std::int64_t align64(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

/// The tokens that one thread sums: in chunks, whose rows it fetches into its scratch memory before
/// it sums them. Of one peer the rows of neighbouring tokens are neighbours too, so that a chunk
/// takes one copy a peer.
class Share {
 public:
  Share(Context& context, const CombineParams& params, int thread, int num_threads)
      : context_(context),
        params_(params),
        pieces_(params, context.scratch_bytes() / std::max(context.num_ranks() - 1, 1)),
        scratch_(context.scratch(thread)),
        begin_(plan::channel_begin(num_tokens(), thread, num_threads)),
        end_(plan::channel_begin(num_tokens(), thread + 1, num_threads)),
        stores_(choose_stores(num_tokens() * pieces_.x_bytes)),
        peers_(context.num_ranks()) {
    for (int rank = 0; rank < context.num_ranks(); ++rank) {
      Peer& peer = peers_[rank];
      peer.first_row =
          plan::rows_from(params.rank_prefix_matrix, context.rank(), rank, context.num_ranks())
              .begin;
      // Behind wait_posted().
      const protocol::OutputsPlace& place =
          context.mailbox_of(context.rank(), params.call).outputs[rank];
      if (rank != context.rank() && place.staged) {
        const StagedOutputs staged = staged_outputs(context, params, pieces_, rank);
        peer.x = {staged.x, true};
        peer.weights = {reinterpret_cast<const std::byte*>(staged.topk_weights), true};
      } else {
        peer.x = find(rank, place.x);
        peer.weights = find(rank, place.topk_weights);
      }
    }
  }

  void run() {
    for (std::int64_t token = begin_; token < end_;) {
      const std::int64_t chunk_end = find_chunk(token);
      for (int i = 0; i < pieces_.count(); ++i) {
        // A fault means that somebody may have given up and taken its rows away.
        context_.check_fault(params_.call);
        const Pieces::Piece piece = pieces_.piece(i);
        fetch(piece);
        for (std::int64_t t = token; t < chunk_end; ++t) sum(t, piece);
      }
      token = chunk_end;
    }
    finish_stores();
  }

 private:
  struct Array {
    const std::byte* rows;
    bool direct;  // `rows` is an address of this process
  };
  struct Peer {
    Array x;
    Array weights;
    std::int64_t first_row;     // of this rank's tokens
    std::int64_t head = 0;      // of the chunk's first row
    std::int64_t num_rows = 0;  // in the chunk
    const std::byte* fetched = nullptr;
  };

  Array find(int rank, const protocol::OutputsPlace::Array& place) {
    const bool own = rank == context_.rank();
    if (!own && place.segment >= 0) {
      // Null: mapped a moment later.
      const std::byte* base = context_.fabric().base(rank, place.segment);
      if (base != nullptr) return {base + place.offset, true};
    }
    return {place.address, own || context_.memory_of(rank).is_own()};
  }
  const Array& array_of(const Peer& peer, const Pieces::Piece& piece) const {
    return piece.is_weights ? peer.weights : peer.x;
  }
  bool is_direct(const Peer& peer) const {
    return peer.x.direct && (pieces_.weights_bytes == 0 || peer.weights.direct);
  }

  std::int64_t num_tokens() const { return params_.call.record.num_tokens; }
  std::int32_t head(std::int64_t token, int rank) const {
    return params_.send_head[token * context_.num_ranks() + rank];
  }

  /// Takes tokens from `token` on, while their rows fit the scratch memory; one token fits always,
  /// by the size of a piece. Returns the token behind them.
  std::int64_t find_chunk(std::int64_t token) {
    const std::int64_t row_bytes =
        std::min(pieces_.max_bytes, std::max(pieces_.x_bytes, pieces_.weights_bytes));
    // Several tokens' pieces are neighbours only if a piece is the whole row.
    const bool whole_rows =
        pieces_.max_bytes >= pieces_.x_bytes && pieces_.max_bytes >= pieces_.weights_bytes;
    for (Peer& peer : peers_) peer.num_rows = 0;
    // Rows of a peer begin at a new cache line.
    std::int64_t room = context_.scratch_bytes() - std::int64_t{64} * context_.num_ranks();
    for (std::int64_t t = token; t < end_; ++t) {
      std::int64_t needed = 0;
      for (int rank = 0; rank < context_.num_ranks(); ++rank) {
        if (!is_direct(peers_[rank]) && head(t, rank) >= 0) needed += row_bytes;
      }
      if (t > token && (needed > room || !whole_rows)) return t;
      room -= needed;
      for (int rank = 0; rank < context_.num_ranks(); ++rank) {
        if (head(t, rank) < 0) continue;
        if (peers_[rank].num_rows++ == 0) peers_[rank].head = head(t, rank);
      }
    }
    return end_;
  }

  void fetch(const Pieces::Piece& piece) {
    std::byte* to = scratch_;
    for (int i = 0; i + 1 < context_.num_ranks(); ++i) {
      const int rank = context_.peer_in_turn(i);
      Peer& peer = peers_[rank];
      const Array& array = array_of(peer, piece);
      if (array.direct || peer.num_rows == 0) continue;
      protocol::schedule_point(protocol::Point::kCopy);
      const std::int64_t bytes = peer.num_rows * piece.bytes;
      const std::byte* from = pieces_.at(array.rows, peer.first_row + peer.head, piece);
      const int error = context_.memory_of(rank).read(to, from, bytes);
      if (error != 0) {
        context_.throw_unreadable(params_.call, rank, std::generic_category().message(error));
      }
      peer.fetched = to;
      to += align64(bytes);
    }
  }

  /// From all ranks in ascending order.
  void sum(std::int64_t token, const Pieces::Piece& piece) {
    protocol::schedule_point(protocol::Point::kCopy);
    sources_.clear();
    for (int rank = 0; rank < context_.num_ranks(); ++rank) {
      const std::int32_t row = head(token, rank);
      if (row < 0) continue;
      const Peer& peer = peers_[rank];
      const Array& array = array_of(peer, piece);
      if (array.direct) {
        sources_.push_back(pieces_.at(array.rows, peer.first_row + row, piece));
      } else {
        sources_.push_back(peer.fetched + (row - peer.head) * piece.bytes);
      }
    }
    sum_token_piece(params_, pieces_, piece, token, sources_, stores_);
  }

  Context& context_;
  const CombineParams& params_;
  const Pieces pieces_;
  std::byte* const scratch_;
  const std::int64_t begin_;
  const std::int64_t end_;
  const Stores stores_;
  std::vector<Peer> peers_;
  std::vector<const std::byte*> sources_;
};

bool has_rows(const Context& context, const CombineParams& params, int source, int rank) {
  const auto rows = plan::rows_from(params.rank_prefix_matrix, source, rank, context.num_ranks());
  return rows.begin < rows.end;
}

/// The peers whose own memory this rank reads.
std::vector<int> find_sources(Context& context, const CombineParams& params) {
  std::vector<int> ranks;
  const auto* outputs = context.mailbox_of(context.rank(), params.call).outputs;
  for (int i = 0; i + 1 < context.num_ranks(); ++i) {
    const int rank = context.peer_in_turn(i);
    if (!outputs[rank].staged && has_rows(context, params, context.rank(), rank)) {
      ranks.push_back(rank);
    }
  }
  return ranks;
}

/// The peers that read this rank's own memory.
std::vector<int> find_readers(Context& context, const CombineParams& params) {
  std::vector<int> ranks;
  if (context.mailbox_of(context.rank(), params.call).outputs[context.rank()].staged) return ranks;
  for (int i = 0; i + 1 < context.num_ranks(); ++i) {
    const int rank = context.peer_in_turn(i);
    if (has_rows(context, params, rank, context.rank())) ranks.push_back(rank);
  }
  return ranks;
}

/// What was read is what the peers had for this call: none of them has ended (another process may
/// have its number by now) or given up (its caller may have written to the rows) before the last
/// read (I11). Whoever gives up writes the fault record of this rank before its caller goes on.
void check_sources(Context& context, const CombineParams& params, const std::vector<int>& sources) {
  for (const int rank : sources) {
    if (!context.memory_of(rank).alive()) {
      context.throw_unreadable(params.call, rank, "its process has ended");
    }
  }
  context.check_fault(params.call);
}

}  // namespace

void combine_pull(Context& context, const CombineParams& params) {
  context.wait_posted(params.call, params.wait_stats);
  const std::vector<int> sources = find_sources(context, params);
  const std::int64_t bytes = params.call.record.num_tokens * params.call.record.hidden *
                             static_cast<std::int64_t>(size_of(params.dtype));
  const int threads = static_cast<int>(std::clamp<std::int64_t>(
      bytes / kBytesPerThread, 1, std::min(context.pool().size(), params.call.num_threads)));
  context.pool().run(threads, [&](int thread) { Share(context, params, thread, threads).run(); });
  check_sources(context, params, sources);
  for (const int rank : sources) {
    context.peer(rank).pulled[context.rank()].publish(params.call.epoch);
    context.ring_doorbell(rank);
  }
  // acquire: pairs with the publish above at each peer that reads this rank's rows, which the
  // caller may write to when this returns.
  context.wait_flags(params.call, "its end of reading", context.own().pulled,
                     find_readers(context, params));
}

}  // namespace deep_ep::host::intranode
