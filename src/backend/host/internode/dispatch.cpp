#include <algorithm>
#include <cstring>

#include "backend/host/internode/checks.hpp"
#include "backend/host/internode/steps.hpp"
#include "backend/host/landing.hpp"
#include "backend/host/lanes.hpp"
#include "backend/host/rows.hpp"
#include "base/error.hpp"
#include "plan/internode.hpp"

namespace deep_ep::host::internode {

using deep_ep::internode::DispatchParams;
using plan::RecordHead;

namespace {

/// What the lanes of a dispatch share.
struct Exchange {
  State& state;
  const DispatchParams& params;
  const Landing& landing;
  const plan::RecordFormat format;
  std::vector<std::int32_t> send_head{};      // [N, R] position among the rows for that rank
  std::vector<std::int32_t> record_tokens{};  // [M] of each record that comes
  Stores stores = Stores::kCached;

  const plan::Topology& topology() const { return state.topology(); }
  const std::int32_t* positions(std::int64_t token, int node) const {
    return send_head.data() + token * topology().num_ranks + topology().rank_of(node, 0);
  }
};

/// A row on its way into the slots of this node's ranks: a record, or a row of this rank's own.
struct Arrival {
  int source;
  plan::SourceMeta meta;
  std::int32_t record;
  const std::int32_t* positions;  // [ranks of the node]
  const std::byte* topk_idx;
  const float* topk_weights;
  const std::byte* x;
};

/// The share of a dispatch that one thread does alone: the same contiguous share of every source's
/// tokens on all ranks. It sends this rank's rows and passes on what comes from its rail peers, a
/// little of each in turn: a rank that waits for room goes on making room for others (I8).
class Lane {
 public:
  Lane(Exchange& exchange, int lane)
      : exchange_(exchange),
        lane_(lane),
        token_end_(own_begin(lane + 1)),
        outgoing_(nodes()),
        incoming_(nodes()),
        x_slots_(exchange.topology().ranks_per_node) {
    for (int node = 0; node < nodes(); ++node) {
      outgoing_[node].token = own_begin(lane);
      if (node == own_node()) continue;
      const auto records = exchange.state.records(node, lane);
      incoming_[node] = records.end - records.begin;
    }
  }

  bool done() const { return done_; }

  bool step() {
    bool moved = send_inside();
    bool complete = outgoing_[own_node()].token == token_end_;
    for (int i = 1; i < nodes(); ++i) {
      const int node = (own_node() + i) % nodes();  // not all to the same one first
      moved |= send_to(node);
      moved |= pass_on_from(node);
      complete = complete && outgoing_[node].token == token_end_ && incoming_[node] == 0 &&
                 exchange_.state.rail_to(lane_, node).idle();
    }
    done_ = complete;
    return moved || complete;
  }

  /// Who has rows that are wanted comes first: who has no room may wait for this rank's.
  std::vector<Missing> missing() {
    std::vector<Missing> list;
    for (int node = 0; node < nodes(); ++node) {
      if (node == own_node() || incoming_[node] == 0) continue;
      const RailReceiver& from = exchange_.state.rail_from(lane_, node);
      list.push_back({from.peer(), from.consumed() + 1, from.arrived()});
    }
    for (int node = 0; node < nodes(); ++node) {
      if (node == own_node()) continue;
      RailSender& to = exchange_.state.rail_to(lane_, node);
      // As it is now: who has given all credits may have left.
      if (to.in_flight() > 0 || outgoing_[node].token < token_end_)
        list.push_back({to.peer(), to.written(), to.freed()});
    }
    return list;
  }

 private:
  struct Outgoing {
    std::int64_t token = 0;
    std::vector<std::byte> head{};  // of the token's record: all before x
    bool built = false;
    int unpublished = 0;
  };
  int nodes() const { return exchange_.topology().num_nodes(); }
  int own_node() const { return exchange_.state.node(); }
  std::int64_t own_begin(int lane) const {
    return plan::channel_begin(exchange_.params.call.record.num_tokens, lane,
                               exchange_.state.num_lanes());
  }
  std::int32_t record_of(std::int64_t token, int node) const {
    return exchange_.params.routing.send_rdma_head[token * nodes() + node];
  }

  plan::SourceMeta meta_of(std::int64_t token, int node) const {
    const std::int32_t* positions = exchange_.positions(token, node);
    plan::SourceMeta meta{own_node(), static_cast<std::int32_t>(token), 0};
    for (int i = 0; i < exchange_.topology().ranks_per_node; ++i)
      if (positions[i] >= 0) meta.ranks |= std::uint64_t{1} << i;
    return meta;
  }

  /// Rows for ranks of this node go to their slots at once.
  bool send_inside() {
    Outgoing& out = outgoing_[own_node()];
    bool moved = false;
    for (int rows = 0; rows < kRowsPerStep && out.token < token_end_; ++out.token) {
      const std::int64_t token = out.token;
      moved = true;
      const std::int32_t record = record_of(token, own_node());
      if (record < 0) continue;
      ++rows;
      place({exchange_.state.rank(), meta_of(token, own_node()), record,
             exchange_.positions(token, own_node()), exchange_.landing.topk_of(token),
             exchange_.landing.weights_of(token),
             exchange_.params.source.x + token * exchange_.params.format.x_bytes},
            [&](std::byte* to) { exchange_.landing.write_scales(token, to); });
    }
    return moved;
  }

  void build_head(std::int64_t token, int node, std::vector<std::byte>& head) const {
    const plan::RecordFormat& format = exchange_.format;
    const plan::RowFormat& row = exchange_.params.format;
    head.assign(format.x, std::byte{0});
    const RecordHead begin{meta_of(token, node), record_of(token, node), 0};
    std::memcpy(head.data(), &begin, sizeof begin);
    std::memcpy(head.data() + sizeof begin, exchange_.positions(token, node),
                std::size_t{4} * exchange_.topology().ranks_per_node);
    if (row.topk_idx_bytes > 0) {
      std::memcpy(head.data() + format.topk_idx, exchange_.landing.topk_of(token),
                  row.topk_idx_bytes);
    }
    if (row.topk_weights_bytes > 0) {
      std::memcpy(head.data() + format.topk_weights, exchange_.landing.weights_of(token),
                  row.topk_weights_bytes);
    }
    exchange_.landing.write_scales(token, head.data() + format.scales);
  }

  bool send_to(int node) {
    Outgoing& out = outgoing_[node];
    RailSender& rail = exchange_.state.rail_to(lane_, node);
    const plan::RecordFormat& format = exchange_.format;
    const std::int64_t window = exchange_.params.window_rows * format.bytes;
    const int most = std::max(kRowsPerStep, exchange_.params.chunk_rows);
    bool moved = false;
    for (int rows = 0; rows < most && out.token < token_end_;) {
      if (record_of(out.token, node) < 0) {
        ++out.token;
        moved = true;
        continue;
      }
      if (!rail.in_row() && rail.in_flight() >= window) break;
      if (!out.built) build_head(out.token, node, out.head);
      out.built = true;
      const std::byte* x = exchange_.params.source.x + out.token * exchange_.params.format.x_bytes;
      const std::uint64_t before = rail.written();
      const bool complete =
          rail.write_row(format.bytes, [&](std::int64_t begin, std::int64_t bytes, std::byte* to) {
            protocol::schedule_point(protocol::Point::kCopy);
            copy_part(out.head, x, begin, bytes, to);
          });
      moved = moved || rail.written() != before;
      if (!complete) break;
      out.built = false;
      ++out.token;
      ++rows;
      exchange_.state.count_rows(1, format.bytes);
      if (++out.unpublished >= exchange_.params.chunk_rows) publish(out, rail);
    }
    publish(out, rail);
    return moved;
  }

  static void publish(Outgoing& out, RailSender& rail) {
    rail.publish();
    out.unpublished = 0;
  }

  /// Bytes [begin, begin + bytes) of a record that is `head`, x and padding.
  void copy_part(const std::vector<std::byte>& head, const std::byte* x, std::int64_t begin,
                 std::int64_t bytes, std::byte* to) const {
    const std::int64_t x_begin = static_cast<std::int64_t>(head.size());
    const std::int64_t x_end = x_begin + exchange_.params.format.x_bytes;
    const std::int64_t end = begin + bytes;
    if (begin < x_begin) std::memcpy(to, head.data() + begin, std::min(end, x_begin) - begin);
    const std::int64_t from = std::max(begin, x_begin);
    const std::int64_t until = std::min(end, x_end);
    if (from < until) std::memcpy(to + (from - begin), x + (from - x_begin), until - from);
    const std::int64_t rest = std::max(begin, x_end);
    if (rest < end) std::memset(to + (rest - begin), 0, end - rest);
  }

  bool pass_on_from(int node) {
    std::int64_t& left = incoming_[node];
    RailReceiver& rail = exchange_.state.rail_from(lane_, node);
    const plan::RecordFormat& format = exchange_.format;
    bool moved = false;
    for (int rows = 0; rows < kRowsPerStep && left > 0; ++rows) {
      const std::byte* record = rail.row(format.bytes);
      if (record == nullptr) break;
      RecordHead head;
      std::memcpy(&head, record, sizeof head);
      place({rail.peer(), head.meta, head.record,
             reinterpret_cast<const std::int32_t*>(record + sizeof head), record + format.topk_idx,
             reinterpret_cast<const float*>(record + format.topk_weights), record + format.x},
            [&](std::byte* to) {
              std::memcpy(to, record + format.scales, exchange_.params.format.scale_bytes);
            });
      rail.pop(format.bytes);
      --left;
      moved = true;
    }
    if (moved) finish_stores();
    rail.release();
    return moved;
  }

  /// Only this rank writes these slots, behind the acquire in find_places() (I5).
  template <class WriteScales>
  void place(const Arrival& row, WriteScales&& write_scales) {
    protocol::schedule_point(protocol::Point::kCopy);
    const plan::Topology& topology = exchange_.topology();
    const std::int64_t x_bytes = exchange_.params.format.x_bytes;
    note_record(row);
    int num_slots = 0;
    for (int i = 0; i < topology.ranks_per_node; ++i) {
      if (row.positions[i] < 0) continue;
      const auto rows = exchange_.state.rows(row.source, i);
      const std::int64_t slot = rows.begin + row.positions[i];
      if (slot >= rows.end) refuse_position(row, i, rows.end - rows.begin);
      const plan::RecvArrays& to = exchange_.landing.of(i);
      x_slots_[num_slots++] = to.x + slot * x_bytes;
      write_scales(to.scales + slot * exchange_.params.format.scale_bytes);
      exchange_.landing.write_topk(row.topk_idx, row.topk_weights, topology.rank_of(own_node(), i),
                                   to, slot);
      to.src_idx[slot] = row.meta.token;
      std::memcpy(to.src_meta + slot * sizeof(plan::SourceMeta), &row.meta,
                  sizeof(plan::SourceMeta));
    }
    copy_row(x_slots_.data(), num_slots, row.x, x_bytes, exchange_.stores);
  }

  /// The forwarder's part of the handle.
  void note_record(const Arrival& row) {
    const deep_ep::internode::Routing& routing = exchange_.params.routing;
    const int width = exchange_.topology().ranks_per_node;
    const auto records =
        plan::part_of(routing.recv_rdma_rank_prefix_sum, exchange_.topology().node_of(row.source));
    if (row.record < 0 || row.record >= records.end - records.begin) {
      throw Error(
          ErrorCode::kPeerFailed,
          fmt::format("{} (call {}) on rank {}: record {} of rank {}, of {}",
                      exchange_.params.call.operation, exchange_.params.call.epoch,
                      exchange_.state.rank(), row.record, row.source, records.end - records.begin),
          {row.source});
    }
    std::int32_t* heads = routing.send_nvl_head + (records.begin + row.record) * width;
    if (exchange_.params.fill_handle) {
      std::copy_n(row.positions, width, heads);
      exchange_.record_tokens[records.begin + row.record] = row.meta.token;
    } else if (!std::equal(heads, heads + width, row.positions)) {
      throw Error(ErrorCode::kDisagreement,
                  fmt::format("{} (call {}) on rank {}: internode_handle.send_nvl_head[{}] is of "
                              "another routing than the handle of rank {}",
                              exchange_.params.call.operation, exchange_.params.call.epoch,
                              exchange_.state.rank(), records.begin + row.record, row.source),
                  {row.source});
    }
  }

  [[noreturn]] void refuse_position(const Arrival& row, int local, std::int64_t rows) const {
    throw Error(ErrorCode::kPeerFailed,
                fmt::format("{} (call {}) on rank {}: row {} of rank {} for rank {}, of {}",
                            exchange_.params.call.operation, exchange_.params.call.epoch,
                            exchange_.state.rank(), row.positions[local], row.source,
                            exchange_.topology().rank_of(own_node(), local), rows),
                {row.source});
  }

  Exchange& exchange_;
  const int lane_;
  const std::int64_t token_end_;
  std::vector<Outgoing> outgoing_;      // by node
  std::vector<std::int64_t> incoming_;  // by node: records that are still to come
  bool done_ = false;
  std::vector<std::byte*> x_slots_;
};

/// What of the handle comes with the rows.
void fill_handle(Exchange& exchange) {
  State& state = exchange.state;
  const plan::Topology& topology = state.topology();
  const Call& call = exchange.params.call;
  const deep_ep::internode::Routing& routing = exchange.params.routing;
  const int channels = routing.num_channels;
  const plan::RecvArrays& own = exchange.landing.of(state.context().rank());
  std::memcpy(static_cast<void*>(routing.recv_src_meta), own.src_meta,
              exchange.params.block_rows * sizeof(plan::SourceMeta));
  for (int source = 0; source < topology.num_ranks; ++source) {
    const auto range = state.rows(source, state.context().rank());
    plan::count_before_channels(own.src_idx + range.begin, own.src_idx + range.end,
                                state.num_tokens(call, source), channels,
                                routing.recv_gbl_channel_prefix_matrix + source * channels);
  }
  for (int node = 0; node < topology.num_nodes(); ++node) {
    const auto records = plan::part_of(routing.recv_rdma_rank_prefix_sum, node);
    const int source = topology.rank_of(node, topology.index_of(state.rank()));
    const std::int32_t* tokens = exchange.record_tokens.data();
    plan::count_before_channels(tokens + records.begin, tokens + records.end,
                                state.num_tokens(call, source), channels,
                                routing.recv_rdma_channel_prefix_matrix + node * channels);
  }
  const std::int64_t records =
      plan::part_of(routing.recv_rdma_rank_prefix_sum, topology.num_nodes() - 1).end;
  std::fill(routing.send_nvl_head + records * topology.ranks_per_node,
            routing.send_nvl_head + routing.nvl_head_rows * topology.ranks_per_node, -1);
}

/// A rank whose handle knows of fewer rows than come finds that too, but not before others write.
void check_room(State& state, const Landing& landing, const Call& call) {
  for (int local = 0; local < state.topology().ranks_per_node; ++local) {
    const std::int64_t rows = state.received_rows(local);
    if (rows <= landing.room(local)) continue;
    const int rank = state.topology().rank_of(state.node(), local);
    throw Error(
        ErrorCode::kDisagreement,
        fmt::format("{} (call {}) on rank {}: rank {} has room for {} rows by its handle, "
                    "but {} are sent there: is the handle of the same dispatch?",
                    call.operation, call.epoch, state.rank(), rank, landing.room(local), rows),
        {rank});
  }
}

}  // namespace

void dispatch(State& state, const DispatchParams& params) {
  const plan::Topology& topology = state.topology();
  const std::int64_t tokens = params.call.record.num_tokens;
  Landing landing(state.context(), params);
  Exchange exchange{state, params, landing,
                    plan::RecordFormat(params.format, topology.ranks_per_node)};
  if (params.cached) check_cached(params, topology);
  landing.publish_places();
  if (params.cached) {
    state.announce(params.call,
                   {.rows = rows_of(params.routing, topology.num_ranks),
                    .send_rdma_head = params.routing.send_rdma_head},
                   params.wait_stats);
    state.wait_announced(params.call, params.wait_stats);
    check_receives(state, params.routing, params.block_rows);
  }
  landing.find_places();
  check_room(state, landing, params.call);

  exchange.send_head.resize(tokens * topology.num_ranks);
  std::vector<std::int32_t> sent(topology.num_ranks);
  plan::build_send_slots(params.routing.is_token_in_rank, tokens, topology.num_ranks, 1,
                         exchange.send_head.data(), sent.data());
  const std::int64_t rows = state.received_rows(state.context().rank());
  exchange.record_tokens.resize(
      plan::part_of(params.routing.recv_rdma_rank_prefix_sum, topology.num_nodes() - 1).end);
  exchange.stores = choose_stores(rows * params.format.x_bytes);
  std::vector<Lane> lanes;
  for (int lane = 0; lane < state.num_lanes(); ++lane) lanes.emplace_back(exchange, lane);
  run_all_lanes(lanes, state.topology().num_ranks, state.context(), params.call)
      .add_to(params.wait_stats);

  landing.publish_landed();
  landing.fill_unused_rows(rows);
  landing.wait_landed();
  if (params.fill_handle) fill_handle(exchange);
  landing.copy_outputs(rows);
}

}  // namespace deep_ep::host::internode
