#include <algorithm>
#include <cstring>

#include "backend/host/internode_ll/calls.hpp"
#include "backend/host/internode_ll/packets.hpp"
#include "backend/host/internode_ll/steps.hpp"
#include "backend/host/internode_ll/work.hpp"
#include "backend/host/quantize.hpp"
#include "backend/host/rows.hpp"
#include "base/error.hpp"

namespace deep_ep::host::internode_ll {

using deep_ep::internode_ll::DispatchParams;
using deep_ep::internode_ll::has;
using deep_ep::internode_ll::Phases;
using deep_ep::internode_ll::Quantization;
using plan::HeadEntry;
using plan::Packet;

namespace {

class Send {
 public:
  Send(State& state, const DispatchParams& params, Exchange& exchange)
      : state_(state), params_(params), exchange_(exchange), routing_(state.routing) {}

  void run() {
    routing_.build(params_.shape, params_.topk_idx);
    exchange_.begin_send();
    send_rows();
    for (const int rank : state_.order_of_sending()) {
      if (state_.masked(rank)) continue;
      write_counts(rank);
      exchange_.put_messages(rank, routing_.num_messages[rank]);
      exchange_.publish_call(rank, routing_.num_messages[rank]);
    }
  }

 private:
  void send_rows() {
    const std::int64_t tokens = routing_.num_tokens;
    share(state_.context(), params_.call, {tokens, tokens * params_.shape.row_bytes},
          [&](int thread, std::int64_t begin, std::int64_t end) {
            std::vector<std::byte*> targets(state_.num_ranks());
            for (std::int64_t token = begin; token < end; ++token)
              send_token(token, state_.scratch(thread), targets);
          });
  }

  void send_token(std::int64_t token, std::vector<std::byte>& scratch,
                  std::vector<std::byte*>& targets) {
    const std::int32_t* messages = routing_.message_of.data() + token * state_.num_ranks();
    int count = 0;
    for (const int rank : state_.order_of_sending()) {
      if (messages[rank] < 0 || state_.masked(rank)) continue;
      const Outbox to = exchange_.to(rank);
      targets[count++] = to.row(messages[rank]);
      write_head(token, rank, to.head(messages[rank]));
    }
    if (count == 0) return;
    protocol::schedule_point(protocol::Point::kCopy);
    const std::byte* x = params_.x + token * row_bytes_of_x();
    if (params_.quantization != Quantization::kNone) {
      scratch.resize(params_.shape.row_bytes);
      quantize_row(x, params_.hidden, params_.quantization, scratch.data(),
                   scratch.data() + params_.x_bytes);
      for (int i = 0; i < count; ++i)
        std::memcpy(targets[i], scratch.data(), params_.shape.row_bytes);
      return;
    }
    for (int i = 0; i < count; ++i) {
      std::memcpy(targets[i], x, params_.x_bytes);
      write_scales(token, targets[i] + params_.x_bytes);
    }
  }

  std::int64_t row_bytes_of_x() const {
    return params_.quantization == Quantization::kNone ? params_.x_bytes : 2 * params_.hidden;
  }

  void write_scales(std::int64_t token, std::byte* to) const {
    const TensorView& scales = params_.x_scales;
    if (!scales.defined()) return;
    const auto* from = scales.as<const std::uint32_t>() + token * scales.strides[0];
    for (int s = 0; s < params_.num_scales; ++s)
      std::memcpy(to + 4 * s, from + s * scales.strides[1], 4);
  }

  void write_head(std::int64_t token, int rank, Packet* head) const {
    const int topk = params_.shape.num_topk;
    put(head[0], exchange_.tag(), ThreeWords{{static_cast<std::uint32_t>(token), 0, 0}});
    for (int k = 0; k < topk; ++k) {
      const Routing::Entry& entry = routing_.entries[token * topk + k];
      const bool there = entry.rank == rank;
      const bool weighted = there && params_.topk_weights != nullptr;
      put(head[1 + k], exchange_.tag(),
          HeadEntry{there ? entry.local_expert : -1, there ? entry.index : 0,
                    weighted ? params_.topk_weights[token * topk + k] : 0.0f});
    }
  }

  void write_counts(int rank) {
    const Outbox to = exchange_.to(rank);
    const int experts = params_.shape.num_local_experts();
    const std::int32_t* counts =
        routing_.expert_counts.data() + static_cast<std::int64_t>(rank) * experts;
    for (int i = 0; i < to.places.count_packets; ++i) {
      ThreeWords words{};
      std::memcpy(words.words, counts + 3 * i, std::min(3, experts - 3 * i) * sizeof *counts);
      put(to.counts()[i], exchange_.tag(), words);
    }
  }

  State& state_;
  const DispatchParams& params_;
  Exchange& exchange_;
  Routing& routing_;
};

class Receive {
 public:
  Receive(State& state, const DispatchParams& params, Exchange& exchange)
      : state_(state), params_(params), exchange_(exchange), own_(exchange.own()) {}

  void run() {
    exchange_.wait_calls();
    find_layout();
    place_rows();
    if (params_.rank_major) fill_unused_rows();
    exchange_.finish();
  }

 private:
  std::int64_t rows_of_group() const {
    return params_.rank_major ? params_.shape.max_tokens
                              : params_.shape.num_ranks * params_.shape.max_tokens;
  }

  /// Rows of `source` for a local expert. A source that is left out has none.
  std::int32_t count_of(int source, int expert) const {
    if (!exchange_.call_of(source).here) return 0;
    std::int32_t count = 0;
    std::memcpy(&count, own_.count(source)[expert / 3].words + expert % 3, sizeof count);
    return count;
  }

  void find_layout() {
    const int experts = params_.shape.num_local_experts();
    const int ranks = state_.num_ranks();
    base_.assign(static_cast<std::size_t>(experts) * ranks, 0);
    for (int e = 0; e < experts; ++e) {
      std::int64_t rows = 0;
      for (int source = 0; source < ranks; ++source) {
        const std::int32_t count = count_of(source, e);
        check_head(source, count >= 0 && count <= exchange_.call_of(source).num_messages);
        base_[e * ranks + source] = rows;
        if (!params_.rank_major) params_.layout_range[e * ranks + source] = rows << 32 | count;
        rows += count;
      }
      if (!params_.rank_major) params_.recv_count[e] = static_cast<std::int32_t>(rows);
      if (params_.cumulative_stats != nullptr)
        params_.cumulative_stats[e] += static_cast<std::int32_t>(rows);
    }
    if (!params_.rank_major) return;
    for (int source = 0; source < ranks; ++source) {
      const std::int32_t count = exchange_.call_of(source).num_messages;
      params_.layout_range[source] = source * params_.shape.max_tokens << 32 | count;
      params_.recv_count[source] = count;
    }
  }

  void place_rows() {
    std::int64_t messages = 0;
    for (int i = 0; i < state_.num_ranks(); ++i) messages += exchange_.call_of(i).num_messages;
    const std::int64_t copies = params_.rank_major ? 1 : 2;  // of a row, or more
    const std::int64_t bytes = copies * messages * params_.shape.row_bytes;
    const bool aligned = reinterpret_cast<std::uintptr_t>(params_.recv_x) % 16 == 0;
    stores_ = aligned ? choose_stores(bytes) : Stores::kCached;
    share(state_.context(), params_.call, {messages, bytes},
          [&](int, std::int64_t begin, std::int64_t end) {
            std::vector<std::byte*> rows(params_.shape.num_topk);
            std::int64_t first = 0;
            for (int source = 0; source < state_.num_ranks(); ++source) {
              const std::int64_t count = exchange_.call_of(source).num_messages;
              for (std::int64_t j = std::max(begin, first); j < std::min(end, first + count); ++j)
                place_row(source, j - first, rows);
              first += count;
            }
            finish_stores();
          });
  }

  void place_row(int source, std::int64_t message, std::vector<std::byte*>& rows) {
    protocol::schedule_point(protocol::Point::kCopy);
    const Packet* head = own_.messages.head(source, message);
    const std::byte* from = own_.messages.plain_row(source, message);
    const auto token = static_cast<std::int32_t>(read<ThreeWords>(head[0]).words[0]);
    int count = 0;
    const auto place = [&](int group, std::int64_t row) {
      const std::int64_t at = group * rows_of_group() + row;
      rows[count++] = params_.recv_x + at * params_.x_bytes;
      params_.src_info[at] = token;
      place_scales(group, row, from + params_.x_bytes);
    };
    if (params_.rank_major) {
      place(source, message);
      place_topk(source, message, head);
    } else {
      for (int k = 0; k < params_.shape.num_topk; ++k) {
        const auto entry = read<HeadEntry>(head[1 + k]);
        if (entry.local_expert < 0 || named_before(head, k, entry.local_expert)) continue;
        check_entry(source, entry);
        place(entry.local_expert,
              base_[entry.local_expert * state_.num_ranks() + source] + entry.index);
      }
    }
    copy_row(rows.data(), count, from, params_.x_bytes, stores_);
  }

  static bool named_before(const Packet* head, int k, std::int32_t expert) {
    for (int i = 0; i < k; ++i)
      if (read<HeadEntry>(head[1 + i]).local_expert == expert) return true;
    return false;
  }

  void check_entry(int source, const HeadEntry& entry) const {
    const bool known = entry.local_expert < params_.shape.num_local_experts();
    check_head(source,
               known && entry.index >= 0 && entry.index < count_of(source, entry.local_expert));
  }

  void check_head(int source, bool ok) const {
    if (ok) return;
    throw Error(ErrorCode::kPeerFailed,
                fmt::format("{} (call {}) on rank {}: rank {} names a row or an expert that is "
                            "none of this rank's",
                            params_.call.operation, params_.call.epoch, state_.rank(), source),
                {source});
  }

  void place_scales(int group, std::int64_t row, const std::byte* from) const {
    const TensorView& scales = params_.recv_x_scales;
    if (!scales.defined()) return;
    auto* to = scales.as<std::uint32_t>() + group * scales.strides[0] + row * scales.strides[1];
    for (int s = 0; s < params_.num_scales; ++s)
      std::memcpy(to + s * scales.strides[2], from + 4 * s, 4);
  }

  void place_topk(int source, std::int64_t message, const Packet* head) const {
    const int topk = params_.shape.num_topk;
    const std::int64_t at = (source * params_.shape.max_tokens + message) * topk;
    for (int k = 0; k < topk; ++k) {
      const auto entry = read<HeadEntry>(head[1 + k]);
      check_head(source, entry.local_expert < params_.shape.num_local_experts());
      set_id(at + k, entry.local_expert);
      if (params_.recv_topk_weights != nullptr) params_.recv_topk_weights[at + k] = entry.weight;
    }
  }

  void set_id(std::int64_t at, std::int32_t id) const {
    if (params_.recv_topk_idx.dtype == DType::kInt64) {
      params_.recv_topk_idx.as<std::int64_t>()[at] = id;
    } else {
      params_.recv_topk_idx.as<std::int32_t>()[at] = id;
    }
  }

  void fill_unused_rows() const {
    const std::int64_t topk = params_.shape.num_topk;
    for (int source = 0; source < state_.num_ranks(); ++source) {
      const std::int64_t used = exchange_.call_of(source).num_messages;
      const std::int64_t begin = (source * params_.shape.max_tokens + used) * topk;
      const std::int64_t end = (source + 1) * params_.shape.max_tokens * topk;
      for (std::int64_t i = begin; i < end; ++i) set_id(i, -1);
      if (params_.recv_topk_weights != nullptr)
        std::fill(params_.recv_topk_weights + begin, params_.recv_topk_weights + end, 0.0f);
    }
  }

  State& state_;
  const DispatchParams& params_;
  Exchange& exchange_;
  const plan::LowLatencyPlaces& own_;
  std::vector<std::int64_t> base_;  // [L, R] first row of the source among the expert's
  Stores stores_ = Stores::kCached;
};

}  // namespace

void dispatch(State& state, const DispatchParams& params) {
  Exchange exchange(state, plan::LowLatencyKind::kDispatch, params);
  if (has(params.phases, Phases::kSend)) {
    Send(state, params, exchange).run();
  } else {
    exchange.find_ticket();
  }
  if (has(params.phases, Phases::kReceive)) Receive(state, params, exchange).run();
}

}  // namespace deep_ep::host::internode_ll
