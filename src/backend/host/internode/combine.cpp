#include <algorithm>
#include <cstring>

#include "backend/host/internode/checks.hpp"
#include "backend/host/internode/lanes.hpp"
#include "backend/host/internode/steps.hpp"
#include "backend/host/intranode/pieces.hpp"
#include "backend/host/rows.hpp"
#include "plan/internode.hpp"

namespace deep_ep::host::internode {

using deep_ep::internode::CombineParams;
using intranode::Pieces;

namespace {

// Rows that one side handles before the other side's turn: keeps what is in flight in the caches.
constexpr int kRowsPerStep = 8;

constexpr std::int64_t align_up(std::int64_t bytes, std::int64_t to) {
  return (bytes + to - 1) / to * to;
}

/// What the lanes of a combine share.
struct Exchange {
  State& state;
  const CombineParams& params;
  const Pieces pieces;
  // A node's sum of a token on the wire: weights, x; the whole is a multiple of 64.
  const std::int64_t x_offset = align_up(pieces.weights_bytes, 16);
  const std::int64_t sum_bytes = align_up(x_offset + pieces.x_bytes, 64);
  const Stores stores = choose_stores(params.call.record.num_tokens * pieces.x_bytes);

  const plan::Topology& topology() const { return state.topology(); }
  int nodes() const { return topology().num_nodes(); }
  int own_node() const { return state.node(); }
  std::int64_t num_tokens() const { return params.call.record.num_tokens; }
};

/// The expert rank's part in a lane: brings this rank's rows to the ranks of its node with the
/// index of the rows' sources, which sum them. A ring for each of them and each node of a source, so
/// that no node's rows wait behind another's.
class HomeBringer {
 public:
  HomeBringer(Exchange& exchange, int lane) : exchange_(exchange), lane_(lane) {
    const State& state = exchange.state;
    for (int source = 0; source < exchange.topology().num_ranks; ++source) {
      const auto rows = state.rows(source, exchange.state.context().rank());
      const std::int64_t tokens = exchange.state.num_tokens(exchange.params.call, source);
      const plan::SourceMeta* metas = exchange.params.routing.recv_src_meta;
      const auto row_of = [&](int at) {
        const std::int64_t first = plan::channel_begin(tokens, at, state.num_lanes());
        return std::lower_bound(
                   metas + rows.begin, metas + rows.end, first,
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
    const std::byte* rows =
        piece.is_weights ? reinterpret_cast<const std::byte*>(exchange_.params.topk_weights)
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

  Exchange& exchange_;
  const int lane_;
  std::vector<Outgoing> outgoing_;  // by source
  bool done_ = false;
};

/// Sums the rows of this node's ranks for the tokens of one rail peer, or of this rank, one token at
/// a time.
class NodeSummer {
 public:
  NodeSummer(Exchange& exchange, int lane, int node)
      : exchange_(exchange),
        lane_(lane),
        node_(node),
        source_(exchange.topology().rank_of(
            node, exchange.topology().index_of(exchange.state.rank()))),
        sum_(exchange.sum_bytes) {
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
      job.out = sum_.data() + (piece.is_weights ? 0 : exchange_.x_offset) + piece.offset;
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

  Exchange& exchange_;
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

/// The share of a combine that one thread does alone: the same contiguous share of every source's
/// tokens on all ranks. It brings this rank's rows to who sums them, sums this node's rows for each
/// node and sends the sums home, and adds what has come home here, a little of each in turn: who
/// waits for room in one ring goes on making room in the others (I8).
class Lane {
 public:
  Lane(Exchange& exchange, int lane)
      : exchange_(exchange),
        lane_(lane),
        token_(own_begin(lane)),
        token_end_(own_begin(lane + 1)),
        bringer_(exchange, lane) {
    for (int node = 0; node < exchange.nodes(); ++node) summers_.emplace_back(exchange, lane, node);
    unpublished_.assign(exchange.nodes(), 0);
  }

  bool done() const { return done_; }

  bool step() {
    bool moved = bringer_.step();
    bool complete = bringer_.done();
    for (int i = 1; i < exchange_.nodes(); ++i) {
      const int node = (exchange_.own_node() + i) % exchange_.nodes();
      moved |= send_home(node);
      complete = complete && summers_[node].done();
    }
    for (int i = 0; i < kRowsPerStep && token_ < token_end_; ++i)
      if (!add_token(moved)) break;
    for (NodeSummer& summer : summers_) summer.return_credits();
    complete = complete && token_ == token_end_;
    for (int node = 0; node < exchange_.nodes(); ++node) {
      if (node == exchange_.own_node()) continue;
      exchange_.state.rail_from(lane_, node).release();
      complete = complete && exchange_.state.rail_to(lane_, node).idle();
    }
    if (complete) finish_stores();
    done_ = complete;
    return moved || complete;
  }

  /// Who has rows that are wanted comes first: who has no room may wait for this rank's.
  std::vector<Missing> missing() {
    std::vector<Missing> list;
    for (int node = 0; node < exchange_.nodes(); ++node) {
      summers_[node].add_missing(list);
      if (node == exchange_.own_node() || token_ == token_end_ || record_of(token_, node) < 0)
        continue;
      RailReceiver& from = exchange_.state.rail_from(lane_, node);
      if (from.row(exchange_.sum_bytes) == nullptr)
        list.push_back({from.peer(), from.consumed() + 1, from.arrived()});
    }
    bringer_.add_missing(list);
    for (int node = 0; node < exchange_.nodes(); ++node) {
      if (node == exchange_.own_node()) continue;
      const RailSender& to = exchange_.state.rail_to(lane_, node);
      if (to.freed() != to.written()) list.push_back({to.peer(), to.written(), to.freed()});
    }
    return list;
  }

 private:
  std::int64_t own_begin(int lane) const {
    return plan::channel_begin(exchange_.num_tokens(), lane, exchange_.state.num_lanes());
  }
  std::int32_t record_of(std::int64_t token, int node) const {
    return exchange_.params.routing.send_rdma_head[token * exchange_.nodes() + node];
  }

  bool send_home(int node) {
    NodeSummer& summer = summers_[node];
    RailSender& rail = exchange_.state.rail_to(lane_, node);
    const std::int64_t window = exchange_.params.window_rows * exchange_.sum_bytes;
    const int most = std::max(kRowsPerStep, exchange_.params.chunk_rows);
    bool moved = false;
    for (int rows = 0; rows < most && !summer.done(); ++rows) {
      if (!summer.step(moved)) break;
      if (!rail.in_row() && rail.in_flight() >= window) break;
      const std::uint64_t before = rail.written();
      const bool complete =
          rail.write_row(exchange_.sum_bytes, [&](std::int64_t begin, std::int64_t bytes,
                                                  std::byte* to) {
            protocol::schedule_point(protocol::Point::kCopy);
            std::memcpy(to, summer.sum() + begin, bytes);
          });
      moved = moved || rail.written() != before;
      if (!complete) break;
      summer.pop();
      exchange_.state.count_rows(1, exchange_.sum_bytes);
      if (++unpublished_[node] >= exchange_.params.chunk_rows) publish(node);
    }
    publish(node);
    return moved;
  }

  void publish(int node) {
    exchange_.state.rail_to(lane_, node).publish();
    unpublished_[node] = 0;
  }

  /// Adds the nodes' sums of token_ in ascending node, if all are here.
  bool add_token(bool& moved) {
    sums_.clear();
    const int own = exchange_.own_node();
    // First, since it takes turns: what it has added of the token stays added.
    if (record_of(token_, own) >= 0 && !summers_[own].step(moved)) return false;
    for (int node = 0; node < exchange_.nodes(); ++node) {
      if (record_of(token_, node) < 0) continue;
      const std::byte* sum = node == own
                                 ? summers_[own].sum()
                                 : exchange_.state.rail_from(lane_, node).row(exchange_.sum_bytes);
      if (sum == nullptr) return false;
      sums_.push_back(sum);
    }
    add_rows();
    for (int node = 0; node < exchange_.nodes(); ++node) {
      if (record_of(token_, node) < 0) continue;
      if (node == own) {
        summers_[own].pop();
      } else {
        exchange_.state.rail_from(lane_, node).pop(exchange_.sum_bytes);
      }
    }
    ++token_;
    moved = true;
    return true;
  }

  void add_rows() {
    protocol::schedule_point(protocol::Point::kCopy);
    const CombineParams& params = exchange_.params;
    SumPiece weights;
    weights.dtype = DType::kFloat32;
    weights.count = exchange_.pieces.weights_bytes / 4;
    weights.sources = sums_.data();
    weights.num_sources = static_cast<int>(sums_.size());
    weights.out = reinterpret_cast<std::byte*>(params.combined_topk_weights) +
                  token_ * exchange_.pieces.weights_bytes;
    if (weights.count > 0) sum_piece(weights, Stores::kCached);
    for (const std::byte*& sum : sums_) sum += exchange_.x_offset;
    SumPiece x = weights;
    x.dtype = params.dtype;
    x.count = params.call.record.hidden;
    const std::int64_t at = token_ * exchange_.pieces.x_bytes;
    x.out = params.combined_x + at;
    for (int b = 0; b < 2; ++b)
      if (params.bias[b] != nullptr) x.bias[b] = params.bias[b] + at;
    sum_piece(x, exchange_.stores);
  }

  Exchange& exchange_;
  const int lane_;
  std::int64_t token_;
  const std::int64_t token_end_;
  HomeBringer bringer_;
  std::vector<NodeSummer> summers_;  // by node
  std::vector<int> unpublished_;     // by node
  bool done_ = false;
  std::vector<const std::byte*> sums_;
};

}  // namespace

void cached_notify(State& state, const CombineParams& params) {
  check_sends(params.routing, params.call.record.num_tokens, state.topology());
  // The caller may have written x past the caches.
  finish_stores();
  state.announce(params.call, {.rows = rows_of(params.routing, state.topology().num_ranks),
                               .send_rdma_head = params.routing.send_rdma_head});
}

void combine(State& state, const CombineParams& params) {
  state.wait_announced(params.call);
  check_receives(state, params.routing, params.handle_rows);
  check_rows(state, params);
  const std::int64_t most = state.context().ring_to(0, 0).shape.max_record();
  Exchange exchange{state, params, Pieces(params, most)};
  std::vector<Lane> lanes;
  for (int lane = 0; lane < state.num_lanes(); ++lane) lanes.emplace_back(exchange, lane);
  run_all_lanes(lanes, state, params.call, params.wait_stats);
}

}  // namespace deep_ep::host::internode
