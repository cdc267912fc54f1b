#include <algorithm>
#include <cstring>

#include "backend/host/internode/checks.hpp"
#include "backend/host/internode/node_sums.hpp"
#include "backend/host/internode/steps.hpp"
#include "backend/host/lanes.hpp"

namespace deep_ep::host::internode {

using deep_ep::internode::CombineParams;

namespace {

/// The share of a combine that one thread does alone: the same contiguous share of every source's
/// tokens on all ranks. It brings this rank's rows to who sums them, sums this node's rows for each
/// node and sends the sums home, and adds what has come home here, a little of each in turn: who
/// waits for room in one ring goes on making room in the others (I8).
class Lane {
 public:
  Lane(CombineExchange& exchange, int lane)
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
      if (from.row(exchange_.format.bytes) == nullptr)
        list.push_back({from.peer(), from.consumed() + 1, from.arrived()});
    }
    bringer_.add_missing(list);
    for (int node = 0; node < exchange_.nodes(); ++node) {
      if (node == exchange_.own_node()) continue;
      RailSender& to = exchange_.state.rail_to(lane_, node);
      // As it is now: who has given all credits may have left.
      if (to.in_flight() > 0) list.push_back({to.peer(), to.written(), to.freed()});
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
    const std::int64_t window = exchange_.params.window_rows * exchange_.format.bytes;
    const int most = std::max(kRowsPerStep, exchange_.params.chunk_rows);
    bool moved = false;
    for (int rows = 0; rows < most && !summer.done(); ++rows) {
      if (!summer.step(moved)) break;
      if (!rail.in_row() && rail.in_flight() >= window) break;
      const std::uint64_t before = rail.written();
      const bool complete = rail.write_row(
          exchange_.format.bytes, [&](std::int64_t begin, std::int64_t bytes, std::byte* to) {
            protocol::schedule_point(protocol::Point::kCopy);
            std::memcpy(to, summer.sum() + begin, bytes);
          });
      moved = moved || rail.written() != before;
      if (!complete) break;
      summer.pop();
      exchange_.state.count_rows(1, exchange_.format.bytes);
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
      const std::byte* sum =
          node == own ? summers_[own].sum()
                      : exchange_.state.rail_from(lane_, node).row(exchange_.format.bytes);
      if (sum == nullptr) return false;
      sums_.push_back(sum);
    }
    add_rows();
    for (int node = 0; node < exchange_.nodes(); ++node) {
      if (record_of(token_, node) < 0) continue;
      if (node == own) {
        summers_[own].pop();
      } else {
        exchange_.state.rail_from(lane_, node).pop(exchange_.format.bytes);
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
    for (const std::byte*& sum : sums_) sum += exchange_.format.x;
    SumPiece x = weights;
    x.dtype = params.dtype;
    x.count = params.call.record.hidden;
    const std::int64_t at = token_ * exchange_.pieces.x_bytes;
    x.out = params.combined_x + at;
    for (int b = 0; b < 2; ++b)
      if (params.bias[b] != nullptr) x.bias[b] = params.bias[b] + at;
    sum_piece(x, exchange_.stores);
  }

  CombineExchange& exchange_;
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
  state.announce(params.call,
                 {.rows = rows_of(params.routing, state.topology().num_ranks),
                  .send_rdma_head = params.routing.send_rdma_head},
                 params.wait_stats);
}

void combine(State& state, const CombineParams& params) {
  state.wait_announced(params.call, params.wait_stats);
  check_receives(state, params.routing, params.handle_rows);
  check_rows(state, params);
  const std::int64_t most = state.context().ring_to(0, 0).shape.max_record();
  CombineExchange exchange{state, params, Pieces(params, most)};
  std::vector<Lane> lanes;
  for (int lane = 0; lane < state.num_lanes(); ++lane) lanes.emplace_back(exchange, lane);
  run_all_lanes(lanes, state.topology().num_ranks, state.context(), params.call)
      .add_to(params.wait_stats);
}

}  // namespace deep_ep::host::internode
