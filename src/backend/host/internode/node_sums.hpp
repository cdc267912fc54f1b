#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/host/internode/state.hpp"
#include "backend/host/intranode/pieces.hpp"
#include "backend/host/lanes.hpp"
#include "backend/host/rows.hpp"
#include "plan/internode.hpp"

// What happens to the rows of a combine inside a node.
namespace deep_ep::host::internode {

using intranode::Pieces;
using plan::align_up;

/// What the lanes of a combine share.
struct CombineExchange {
  State& state;
  const deep_ep::internode::CombineParams& params;
  const Pieces pieces;
  const plan::SumFormat format{pieces.weights_bytes, pieces.x_bytes};
  const Stores stores = choose_stores(params.call.record.num_tokens * pieces.x_bytes);

  const plan::Topology& topology() const { return state.topology(); }
  int nodes() const { return topology().num_nodes(); }
  int own_node() const { return state.node(); }
  std::int64_t num_tokens() const { return params.call.record.num_tokens; }
};

/// The expert rank's part in a lane: brings this rank's rows to the ranks of its node with the
/// index of the rows' sources, which sum them. A ring for each of them and each node of a source,
/// so that no node's rows wait behind another's.
class HomeBringer {
 public:
  HomeBringer(CombineExchange& exchange, int lane) : exchange_(exchange), lane_(lane) {
    const State& state = exchange.state;
    for (int source = 0; source < exchange.topology().num_ranks; ++source) {
      const auto rows = state.rows(source, exchange.state.context().rank());
      const std::int64_t tokens = exchange.state.num_tokens(exchange.params.call, source);
      const plan::SourceMeta* metas = exchange.params.routing.recv_src_meta;
      const auto row_of = [&](int at) {
        const std::int64_t first = plan::channel_begin(tokens, at, state.num_lanes());
        return std::lower_bound(metas + rows.begin, metas + rows.end, first,
                                [](const plan::SourceMeta& meta, std::int64_t token) {
                                  return meta.token < token;
                                }) -
               metas;
      };
      Outgoing out;
      if (exchange.topology().index_of(source) != exchange.state.context().rank()) {
        out.row = row_of(lane);
        out.row_end = row_of(lane + 1);
      }
      outgoing_.push_back(out);
    }
  }

  bool step() {
    bool moved = false;
    const int num_ranks = exchange_.topology().num_ranks;
    done_ = true;
    for (int i = 1; i < num_ranks; ++i) {
      const int source = (exchange_.state.rank() + i) % num_ranks;
      moved |= send_to(source);
      done_ = done_ && outgoing_[source].row == outgoing_[source].row_end;
    }
    return moved;
  }
  bool done() const { return done_; }

  void add_missing(std::vector<Missing>& list) {
    for (int source = 0; source < exchange_.topology().num_ranks; ++source) {
      if (outgoing_[source].row == outgoing_[source].row_end) continue;
      const protocol::RingSender& ring = ring_to(source);
      list.push_back({summer_of(source), ring.written, ring.freed});
    }
  }

 private:
  struct Outgoing {
    std::int64_t row = 0;
    std::int64_t row_end = 0;
    int piece = 0;
  };

  int summer_of(int source) const {
    return exchange_.topology().rank_of(exchange_.own_node(),
                                        exchange_.topology().index_of(source));
  }
  protocol::RingSender& ring_to(int source) {
    const plan::Topology& topology = exchange_.topology();
    return exchange_.state.context().ring_to(
        lane_ * topology.num_nodes() + topology.node_of(source), topology.index_of(source));
  }

  bool send_to(int source) {
    Outgoing& out = outgoing_[source];
    if (out.row == out.row_end) return false;
    protocol::RingSender& ring = ring_to(source);
    const Pieces& pieces = exchange_.pieces;
    const std::int64_t window =
        exchange_.params.nvl_window_rows * (pieces.weights_bytes + pieces.x_bytes);
    bool moved = false;
    for (int rows = 0; rows < kRowsPerStep && out.row < out.row_end;) {
      const Pieces::Piece piece = pieces.piece(out.piece);
      if (!within(ring, window) || !write(ring, out.row, piece)) break;
      moved = true;
      if (++out.piece < pieces.count()) continue;
      out.piece = 0;
      ++out.row;
      ++rows;
    }
    if (!moved) return false;
    // release: pairs with the acquire in RingReceiver::peek() at the rank that sums.
    ring.publish();
    exchange_.state.context().ring_doorbell(exchange_.topology().index_of(source));
    return true;
  }

  static bool within(protocol::RingSender& ring, std::int64_t window) {
    if (static_cast<std::int64_t>(ring.written - ring.freed) < window) return true;
    ring.refresh_credits();
    return static_cast<std::int64_t>(ring.written - ring.freed) < window;
  }

  bool write(protocol::RingSender& ring, std::int64_t row, const Pieces::Piece& piece) {
    const std::int64_t record = align_up(piece.bytes, 64);
    std::byte* to = ring.reserve(record);
    if (to == nullptr) return false;
    protocol::schedule_point(protocol::Point::kCopy);
    const std::byte* rows = piece.is_weights
                                ? reinterpret_cast<const std::byte*>(exchange_.params.topk_weights)
                                : exchange_.params.x;
    const std::byte* from = exchange_.pieces.at(rows, row, piece);
    // Weights need not be multiples of 16 bytes.
    if (piece.is_weights) {
      std::memcpy(to, from, piece.bytes);
    } else {
      copy_row(to, from, piece.bytes, Stores::kCached);
    }
    ring.advance(record);
    return true;
  }

  CombineExchange& exchange_;
  const int lane_;
  std::vector<Outgoing> outgoing_;  // by source
  bool done_ = false;
};

/// Sums the rows of this node's ranks for the tokens of one rail peer, or of this rank, one token
/// at a time.
class NodeSummer {
 public:
  NodeSummer(CombineExchange& exchange, int lane, int node)
      : exchange_(exchange),
        lane_(lane),
        node_(node),
        source_(
            exchange.topology().rank_of(node, exchange.topology().index_of(exchange.state.rank()))),
        sum_(exchange.format.bytes) {
    const auto records = exchange.state.records(node, lane);
    const std::int64_t first =
        plan::part_of(exchange.params.routing.recv_rdma_rank_prefix_sum, node).begin;
    record_ = first + records.begin;
    record_end_ = first + records.end;
  }

  bool done() const { return record_ == record_end_; }
  const std::byte* sum() const { return sum_.data(); }
  void pop() {
    piece_ = 0;
    ++record_;
  }

  /// Adds the pieces of the present record that are all here; true when its sum is complete.
  bool step(bool& moved) {
    for (; piece_ < exchange_.pieces.count(); ++piece_) {
      const Pieces::Piece piece = exchange_.pieces.piece(piece_);
      if (!gather(piece)) return false;
      SumPiece job;
      job.sources = sources_.data();
      job.num_sources = static_cast<int>(sources_.size());
      job.dtype = piece.is_weights ? DType::kFloat32 : exchange_.params.dtype;
      job.count = piece.bytes / static_cast<std::int64_t>(size_of(job.dtype));
      job.out = sum_.data() + (piece.is_weights ? 0 : exchange_.format.x) + piece.offset;
      sum_piece(job, Stores::kCached);
      for (const int local : locals_) {
        ring_from(local).advance(align_up(piece.bytes, 64));
        unreturned_ = true;
      }
      moved = true;
    }
    return true;
  }

  void return_credits() {
    if (!unreturned_) return;
    Context& context = exchange_.state.context();
    for (int local = 0; local < context.num_ranks(); ++local) {
      if (local == context.rank()) continue;
      ring_from(local).release();
      context.ring_doorbell(local);
    }
    unreturned_ = false;
  }

  void add_missing(std::vector<Missing>& list) {
    if (done() || piece_ == exchange_.pieces.count()) return;
    const Pieces::Piece piece = exchange_.pieces.piece(piece_);
    const Context& context = exchange_.state.context();
    for (int local = 0; local < exchange_.topology().ranks_per_node; ++local) {
      if (local == context.rank() || head(local) < 0) continue;
      protocol::RingReceiver& ring = ring_from(local);
      if (ring.peek(align_up(piece.bytes, 64)) == nullptr)
        list.push_back({context.global_rank(local), ring.consumed + 1, ring.arrived});
    }
  }

 private:
  std::int32_t head(int local) const {
    return exchange_.params.routing
        .send_nvl_head[record_ * exchange_.topology().ranks_per_node + local];
  }
  protocol::RingReceiver& ring_from(int local) {
    return exchange_.state.context().ring_from(lane_ * exchange_.nodes() + node_, local);
  }

  /// Finds the contributions to the record in ascending rank.
  bool gather(const Pieces::Piece& piece) {
    sources_.clear();
    locals_.clear();
    const Context& context = exchange_.state.context();
    for (int local = 0; local < exchange_.topology().ranks_per_node; ++local) {
      const std::int32_t at = head(local);
      if (at < 0) continue;
      if (local == context.rank()) {
        const std::byte* rows =
            piece.is_weights ? reinterpret_cast<const std::byte*>(exchange_.params.topk_weights)
                             : exchange_.params.x;
        const std::int64_t row = exchange_.state.rows(source_, local).begin + at;
        sources_.push_back(exchange_.pieces.at(rows, row, piece));
        continue;
      }
      const std::byte* record = ring_from(local).peek(align_up(piece.bytes, 64));
      if (record == nullptr) return false;
      sources_.push_back(record);
      locals_.push_back(local);
    }
    return true;
  }

  CombineExchange& exchange_;
  const int lane_;
  const int node_;
  const int source_;
  std::int64_t record_ = 0;
  std::int64_t record_end_ = 0;
  int piece_ = 0;
  bool unreturned_ = false;
  std::vector<std::byte> sum_;
  std::vector<const std::byte*> sources_;
  std::vector<int> locals_;
};

}  // namespace deep_ep::host::internode
