#include <algorithm>
#include <cstring>

#include "backend/host/internode_ll/calls.hpp"
#include "backend/host/internode_ll/packets.hpp"
#include "backend/host/internode_ll/steps.hpp"
#include "backend/host/internode_ll/work.hpp"
#include "backend/host/rows.hpp"
#include "backend/host/wire.hpp"
#include "base/error.hpp"
#include "plan/numerics.hpp"

namespace deep_ep::host::internode_ll {

using deep_ep::internode_ll::CombineParams;
using deep_ep::internode_ll::has;
using deep_ep::internode_ll::Phases;
using plan::HeadEntry;
using plan::Packet;
using plan::WireFormat;

namespace {

/// Rows of one source within a group of rows: one element of layout_range.
struct Range {
  explicit Range(std::int64_t packed)
      : begin(packed >> 32), count(packed & std::int64_t{0xffffffff}) {}
  std::int64_t begin;
  std::int64_t count;
};

[[noreturn]] void throw_wrong_handle(const CombineParams& params, int rank, int source) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{} (call {}) on rank {}: the topk_idx of rank {} is not what dispatch "
                          "was given when it made this handle",
                          params.call.operation, params.call.epoch, rank, source));
}

/// The part before anything is waited for at home: weights to the ranks of the experts, and what
/// these ranks send back.
class Send {
 public:
  Send(State& state, const CombineParams& params, Exchange& exchange)
      : state_(state), params_(params), exchange_(exchange), routing_(state.routing) {}

  void run() {
    exchange_.begin_send();
    if (!params_.rank_major) write_weights();
    for (const int rank : state_.order_of_sending()) {
      if (state_.masked(rank)) continue;
      if (!params_.rank_major) exchange_.put_messages(rank, routing_.num_messages[rank]);
      exchange_.publish_call(rank, routing_.num_messages[rank]);
    }
    if (!params_.rank_major) exchange_.wait_calls();
    std::int64_t rows = 0;
    for (int i = 0; i < state_.num_ranks(); ++i) rows += num_messages(i);
    stores_ = choose_stores(rows * params_.shape.row_bytes);
    for (const int source : state_.order_of_sending()) {
      if (state_.masked(source)) continue;
      write_sums(source);
      exchange_.publish_returns(source, num_messages(source));
    }
  }

 private:
  void write_weights() {
    std::vector<HeadEntry> entries;
    for (std::int64_t token = 0; token < routing_.num_tokens; ++token) {
      for (int rank = 0; rank < state_.num_ranks(); ++rank) {
        const std::int32_t message = routing_.message_of[token * state_.num_ranks() + rank];
        if (message < 0 || state_.masked(rank)) continue;
        find_entries(token, rank, entries);
        Packet* head = exchange_.to(rank).head(message);
        put(head[0], exchange_.tag(),
            ThreeWords{{static_cast<std::uint32_t>(token),
                        static_cast<std::uint32_t>(entries.size()), 0}});
        entries.resize(params_.shape.num_topk, HeadEntry{-1, 0, 0.0f});
        for (int k = 0; k < params_.shape.num_topk; ++k)
          put(head[1 + k], exchange_.tag(), entries[k]);
      }
    }
  }

  /// The token's experts at `rank`, ascending; weights of one that is named several times are added
  /// in the order of k.
  void find_entries(std::int64_t token, int rank, std::vector<HeadEntry>& entries) const {
    entries.clear();
    const int topk = params_.shape.num_topk;
    for (int k = 0; k < topk; ++k) {
      const Routing::Entry& one = routing_.entries[token * topk + k];
      if (one.rank != rank) continue;
      auto at = std::find_if(entries.begin(), entries.end(), [&](const HeadEntry& entry) {
        return entry.local_expert >= one.local_expert;
      });
      if (at == entries.end() || at->local_expert != one.local_expert)
        at = entries.insert(at, {one.local_expert, one.index, 0.0f});
      at->weight = plan::add(at->weight, params_.topk_weights[token * topk + k]);
    }
  }

  std::int64_t num_messages(int source) const {
    return params_.rank_major ? rows_of(source).count : exchange_.call_of(source).num_messages;
  }

  void write_sums(int source) {
    const Outbox to = exchange_.to(source);
    // What is put from the mirror is read again at once.
    const Stores stores = state_.remote(source) ? Stores::kCached : stores_;
    const std::int64_t messages = num_messages(source);
    const std::int64_t read_bytes = 2 * messages * row_bytes();  // two experts, or more
    share(state_.context(), params_.call, {messages, read_bytes},
          [&](int thread, std::int64_t begin, std::int64_t end) {
            Scratch scratch(params_.shape.num_topk, state_.scratch(thread));
            for (std::int64_t j = begin; j < end; ++j) {
              protocol::schedule_point(protocol::Point::kCopy);
              const Row row{source, j, to.return_row(j), stores};
              const std::uint32_t token = params_.rank_major ? copy(row) : reduce(row, scratch);
              finish_stores();
              put(*to.return_head(j), exchange_.tag(), ThreeWords{{token, 0, 0}});
            }
          });
  }

  Range rows_of(int source) const {
    const Range range(params_.layout_range[source]);
    const std::int64_t all = params_.shape.num_ranks * params_.shape.max_tokens;
    require(range.begin >= 0 && range.count <= params_.shape.max_tokens &&
                range.begin + range.count <= all,
            "handle.layout_range[0, {}] says rows {} to {}, allowed are up to {} within {}", source,
            range.begin, range.begin + range.count, params_.shape.max_tokens, all);
    return range;
  }

  /// What one message of a source brings home, and to where.
  struct Row {
    int source;
    std::int64_t message;
    std::byte* to;
    Stores stores;
  };

  std::uint32_t copy(const Row& row) const {
    const std::int64_t at = rows_of(row.source).begin + row.message;
    const std::byte* x = params_.x + at * row_bytes();
    if (params_.wire == WireFormat::kBfloat16) {
      copy_row(row.to, x, row_bytes(), row.stores);
    } else {
      encode_row(params_.wire, x, params_.hidden, row.to);
    }
    return static_cast<std::uint32_t>(params_.src_info[at]);
  }

  struct Scratch {
    Scratch(int topk, std::vector<std::byte>& row) : rows(topk), weights(topk), sum(row) {}
    std::vector<const std::byte*> rows;
    std::vector<float> weights;
    std::vector<std::byte>& sum;  // of bfloat16, that travel in another format
  };

  std::uint32_t reduce(const Row& row, Scratch& scratch) const {
    const Packet* head = exchange_.own().messages.head(row.source, row.message);
    const auto first = read<ThreeWords>(head[0]);
    const std::uint32_t token = first.words[0];
    const auto count = static_cast<int>(first.words[1]);
    if (count < 1 || count > params_.shape.num_topk)
      throw_wrong_handle(params_, state_.rank(), row.source);
    for (int i = 0; i < count; ++i) {
      const auto entry = read<HeadEntry>(head[1 + i]);
      scratch.rows[i] = find_row(row.source, static_cast<std::int32_t>(token), entry);
      scratch.weights[i] = entry.weight;
    }
    SumPiece piece;
    piece.count = params_.hidden;
    piece.sources = scratch.rows.data();
    piece.num_sources = count;
    piece.weights = scratch.weights.data();
    piece.out = row.to;
    if (params_.wire == WireFormat::kBfloat16) {
      sum_piece(piece, row.stores);
      return token;
    }
    scratch.sum.resize(static_cast<std::size_t>(row_bytes()));
    piece.out = scratch.sum.data();
    sum_piece(piece, Stores::kCached);
    encode_row(params_.wire, scratch.sum.data(), params_.hidden, row.to);
    return token;
  }

  const std::byte* find_row(int source, std::int32_t token, const HeadEntry& entry) const {
    const std::int64_t rows = params_.shape.num_ranks * params_.shape.max_tokens;
    if (entry.local_expert >= 0 && entry.local_expert < params_.shape.num_local_experts()) {
      const Range range(
          params_.layout_range[std::int64_t{entry.local_expert} * state_.num_ranks() + source]);
      const std::int64_t row = range.begin + entry.index;
      const std::int64_t at = entry.local_expert * rows + row;
      if (entry.index >= 0 && entry.index < range.count && row >= 0 && row < rows &&
          params_.src_info[at] == token)
        return params_.x + at * row_bytes();
    }
    throw_wrong_handle(params_, state_.rank(), source);
  }

  std::int64_t row_bytes() const { return 2 * params_.hidden; }  // of x

  State& state_;
  const CombineParams& params_;
  Exchange& exchange_;
  const Routing& routing_;
  Stores stores_ = Stores::kCached;
};

/// The part at home.
class Receive {
 public:
  Receive(State& state, const CombineParams& params, Exchange& exchange)
      : state_(state),
        params_(params),
        exchange_(exchange),
        returns_(exchange.own().returns),
        routing_(state.routing),
        num_here_(state.num_ranks(), 0) {}

  void run() {
    if (params_.rank_major) {
      exchange_.wait_calls();
      check_counts();
    }
    wait_rows();
    const std::int64_t tokens = routing_.num_tokens;
    share(state_.context(), params_.call,
          {tokens, 4 * tokens * params_.hidden},  // two ranks, or more
          [&](int, std::int64_t begin, std::int64_t end) {
            std::vector<const std::byte*> rows(state_.num_ranks());
            for (std::int64_t token = begin; token < end; ++token) sum_token(token, rows);
          });
    exchange_.finish();
  }

 private:
  void check_counts() const {
    for (int source = 0; source < state_.num_ranks(); ++source) {
      const SourceCall& call = exchange_.call_of(source);
      if (call.here && call.num_messages != Range(params_.layout_range[source]).count)
        throw_wrong_handle(params_, state_.rank(), source);
    }
  }

  bool complete(int rank) const {
    return state_.masked(rank) || num_here_[rank] == routing_.num_messages[rank];
  }

  void wait_rows() {
    exchange_.start_waiting();
    const auto look = [&] {
      bool all = true;
      for (int rank = 0; rank < state_.num_ranks(); ++rank) {
        if (complete(rank)) continue;
        num_here_[rank] =
            exchange_.count_returns(rank, num_here_[rank], routing_.num_messages[rank]);
        if (complete(rank)) {
          exchange_.arrived(rank);
        } else {
          all = false;
        }
      }
      return all;
    };
    state_.wait(params_.call, "its sums", look, [&] {
      std::vector<Missing> missing;
      for (int rank = 0; rank < state_.num_ranks(); ++rank)
        if (!complete(rank))
          missing.push_back({rank, static_cast<std::uint64_t>(routing_.num_messages[rank]),
                             static_cast<std::uint64_t>(num_here_[rank])});
      return missing;
    });
  }

  void sum_token(std::int64_t token, std::vector<const std::byte*>& rows) const {
    protocol::schedule_point(protocol::Point::kCopy);
    const std::int32_t* messages = routing_.message_of.data() + token * state_.num_ranks();
    int count = 0;
    for (int rank = 0; rank < state_.num_ranks(); ++rank) {
      if (messages[rank] < 0 || num_here_[rank] != routing_.num_messages[rank] ||
          state_.masked(rank))
        continue;
      // Rank-major, only this tells that the ranks number the messages differently.
      if (read<ThreeWords>(*returns_.head(rank, messages[rank])).words[0] != token)
        throw_wrong_handle(params_, state_.rank(), state_.rank());
      rows[count++] = returns_.plain_row(rank, messages[rank]);
    }
    std::byte* out = params_.combined_x + token * 2 * params_.hidden;
    if (params_.wire != WireFormat::kBfloat16)
      return sum_wire_rows({params_.wire, params_.hidden, rows.data(), count, out});
    SumPiece piece;
    piece.count = params_.hidden;
    piece.sources = rows.data();
    piece.num_sources = count;
    piece.out = out;
    sum_piece(piece, Stores::kCached);
  }

  State& state_;
  const CombineParams& params_;
  Exchange& exchange_;
  const plan::MessageArea& returns_;
  const Routing& routing_;
  std::vector<std::int32_t> num_here_;  // by rank
};

}  // namespace

void combine(State& state, const CombineParams& params) {
  Exchange exchange(state, plan::LowLatencyKind::kCombine, params);
  state.routing.build(params.shape, params.topk_idx);
  if (has(params.phases, Phases::kSend)) {
    Send(state, params, exchange).run();
  } else {
    exchange.find_ticket();
  }
  if (has(params.phases, Phases::kReceive)) Receive(state, params, exchange).run();
}

}  // namespace deep_ep::host::internode_ll
