#include "backend/host/internode/state.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "backend/agreement.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "fabric/agree.hpp"
#include "fabric/local_heap.hpp"
#include "fabric/symmetric_heap_factory.hpp"

namespace deep_ep::host::internode {

static_assert(protocol::RailMessage::kMaxRanksPerNode >= plan::kMaxRanksPerNode);

State::State(Context& context, const BackendOptions& options)
    : context_(context), one_process_(options.one_process) {
  shape_.num_ranks = options.topology.num_ranks;
  shape_.ranks_per_node = options.topology.ranks_per_node;
}

void State::alloc(Bootstrap& bootstrap, std::int64_t bytes, const BackendOptions& options) {
  // A lane has rings inside the node for each node's tokens.
  const int most_lanes = context_.num_lanes() / topology().num_nodes();
  protocol::RailShape least = shape_;
  least.ring_bytes = protocol::RailBlock::kLeastRingBytes;
  const std::int64_t least_bytes = protocol::RailBlock::bytes(least);
  if (bytes < least_bytes && rank() == 0) {
    log::info("num_rdma_bytes raised from {} to {}: rings between {} nodes of {} ranks need that",
              bytes, least_bytes, topology().num_nodes(), topology().ranks_per_node);
  }
  shape_ = protocol::RailBlock::fit(shape_, most_lanes, std::max(bytes, least_bytes));
  fabric::SymmetricHeapOptions heap_options{
      .bytes = protocol::RailBlock::bytes(shape_) + 2 * options.low_latency_bytes,
      .timeout = options.timeout,
      .on_signal = [doorbell = context_.own().doorbell] { doorbell->ring(); }};
  if (options.low_latency_bytes > 0) {
    heap_options.memory = make_mapped_memory(bootstrap, heap_options.bytes);
    if (rank() == 0) {
      log::info("low latency between {} nodes takes 2 x {} bytes more: what comes, and a mirror",
                topology().num_nodes(), options.low_latency_bytes);
    }
  }
  std::unique_ptr<fabric::SymmetricHeap> heap;
  if (one_process_) {
    heap = std::make_unique<fabric::LocalHeap>(bootstrap, heap_options);
  } else {
    heap = fabric::make_symmetric_heap(bootstrap, heap_options);
  }
  Carver carver(heap->base());
  block_ = protocol::RailBlock::carve(carver, shape_);
  heap_ = std::move(heap);
  make_rings();
  context_.set_network(this);
  log::debug("rank {}: {} lanes of {} bytes to each of {} other nodes", rank(), num_lanes(),
             shape_.ring_bytes, num_peers());
}

std::shared_ptr<fabric::Mapping> State::make_mapped_memory(Bootstrap& bootstrap,
                                                           std::int64_t bytes) {
  fabric::together(bootstrap, [&] { segment_ = context_.fabric().add_segment(bytes); });
  return context_.fabric().own_segment(segment_);
}

void State::free() noexcept {
  // raise_fault() has told the others what there was to tell.
  if (heap_ != nullptr && context_.faulted()) heap_->abandon();
  context_.set_network(nullptr);
  senders_.clear();
  receivers_.clear();
  heap_.reset();
}

void State::make_rings() {
  const auto ring = [&](int lane, int peer) { return std::int64_t{lane} * num_peers() + peer; };
  for (int lane = 0; lane < num_lanes(); ++lane) {
    for (int node = 0; node < topology().num_nodes(); ++node) {
      if (node == this->node()) continue;
      const std::int64_t here = ring(lane, peer_of(node));
      const std::int64_t there = ring(lane, peer_index(this->node(), node));
      const int peer = topology().rank_of(node, topology().index_of(rank()));
      const auto place = [&](std::int64_t at_receiver, std::int64_t at_sender) {
        return RailPlace{peer,
                         {shape_.ring_bytes},
                         offset(block_.ring_data + at_receiver * shape_.ring_bytes),
                         offset(&block_.ring_tail[at_receiver]),
                         offset(&block_.ring_head[at_sender])};
      };
      senders_.emplace_back(*heap_, place(there, here),
                            block_.out_ring_data + here * shape_.ring_bytes);
      receivers_.emplace_back(*heap_, place(here, there));
    }
  }
}

const protocol::RailMessage& State::message_from(const Call& call, int node) const {
  return *reinterpret_cast<const protocol::RailMessage*>(block_.mailbox[call.epoch % 2].messages +
                                                         peer_of(node) * shape_.message_bytes());
}

const std::int32_t* State::experts_from(const Call& call, int node) const {
  return reinterpret_cast<const std::int32_t*>(&message_from(call, node) + 1);
}

// The mailbox of two calls ago is read by nobody any more (I3), nor is what was put from here.
void State::post_rails(const Call& call, const Announcement& own) {
  const protocol::RailBlock::Mailbox& mailbox = block_.mailbox[call.epoch % 2];
  const int experts_per_node =
      own.tokens_per_expert == nullptr ? 0 : call.record.num_experts / topology().num_nodes();
  for (int node = 0; node < topology().num_nodes(); ++node) {
    std::vector<std::int32_t>& lanes = lane_records_[node];
    for (int lane = 0; lane <= num_lanes(); ++lane) {
      const std::int64_t first = plan::channel_begin(call.record.num_tokens, lane, num_lanes());
      lanes[lane] = own.send_rdma_head == nullptr
                        ? 0
                        : plan::first_record(own.send_rdma_head, call.record.num_tokens, first,
                                             topology(), node);
    }
    if (node == this->node()) continue;
    const int peer = topology().rank_of(node, topology().index_of(rank()));
    std::byte* out = mailbox.out_messages + peer_of(node) * shape_.message_bytes();
    if (!flush(call, peer, call.timeout)) continue;
    auto& message = *reinterpret_cast<protocol::RailMessage*>(out);
    message = {};
    message.record = call.record;
    message.num_records = lanes[num_lanes()];
    message.num_experts = experts_per_node;
    std::copy_n(own.rows.data() + topology().rank_of(node, 0), topology().ranks_per_node,
                message.rows);
    std::copy_n(lanes.data(), num_lanes() + 1, message.lane_records);
    if (experts_per_node > 0) {
      std::copy_n(own.tokens_per_expert + std::int64_t{node} * experts_per_node, experts_per_node,
                  reinterpret_cast<std::int32_t*>(&message + 1));
    }
    const int slot = peer_index(this->node(), node);
    put(peer, mailbox.messages + slot * shape_.message_bytes(), out,
        static_cast<std::int64_t>(sizeof message) + 4 * experts_per_node);
    signal(peer, &mailbox.posted[slot], call.epoch);
  }
}

void State::put(int rank, const void* at, const void* source, std::int64_t bytes) {
  unless_lost(*heap_, rank, [&] { heap_->put(rank, offset(at), source, bytes); });
}

void State::signal(int rank, const void* word, std::uint64_t value) {
  unless_lost(*heap_, rank, [&] { heap_->signal(rank, offset(word), value); });
}

bool State::flush(const Call& call, int rank, std::chrono::milliseconds timeout) {
  using std::chrono::milliseconds;
  using std::chrono::steady_clock;
  const auto end = steady_clock::now() + timeout;
  bool flushed = false;
  bool waited = false;
  // Most take no time; of one that does the others are to know.
  bool last = false;  // it begins behind the end: this rank may have been stopped meanwhile
  for (milliseconds turn(1); !flushed && !last && !heap_->lost(rank); turn = milliseconds(50)) {
    last = steady_clock::now() >= end;
    unless_lost(*heap_, rank, [&] { flushed = heap_->flush(rank, turn); });
    if (flushed) break;
    context_.check_fault(call);
    context_.announce_wait({{rank, call.epoch, 0}});
    waited = true;
  }
  if (waited && (flushed || heap_->lost(rank))) context_.announce_end_of_wait();
  if (flushed) return true;
  if (heap_->lost(rank)) return false;
  throw Error(ErrorCode::kTimeout,
              fmt::format("{} (call {}) on rank {}: what the call before the last sent to rank {} "
                          "has not left within {} ms",
                          call.operation, call.epoch, this->rank(), rank, call.timeout.count()),
              {rank});
}

void State::wait_rails(const Call& call, std::int64_t* wait_stats) {
  const protocol::EpochFlag* posted = block_.mailbox[call.epoch % 2].posted;
  const auto start = std::chrono::steady_clock::now();
  std::vector<int> nodes;
  for (int node = 0; node < topology().num_nodes(); ++node)
    if (node != this->node()) nodes.push_back(node);
  const auto rail = [&](int node) { return topology().rank_of(node, topology().index_of(rank())); };
  const auto arrived = [&](int node) {
    // acquire: pairs with the signal in post_rails() of the peer.
    if (!posted[peer_of(node)].reached(call.epoch)) return false;
    if (wait_stats != nullptr) {
      wait_stats[rail(node)] +=
          (std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1);
    }
    return true;
  };
  context_.wait(
      call, "the ranks of other nodes to call it",
      [&] {
        std::erase_if(nodes, arrived);
        return nodes.empty();
      },
      [&] {
        std::vector<Missing> missing;
        for (const int node : nodes)
          missing.push_back({rail(node), call.epoch, posted[peer_of(node)].seen()});
        return missing;
      });
  for (int node = 0; node < topology().num_nodes(); ++node) {
    if (node == this->node()) continue;
    const protocol::RailMessage& message = message_from(call, node);
    const int peer = topology().rank_of(node, topology().index_of(rank()));
    if (const auto difference = find_difference(call.record, message.record)) {
      throw Error(ErrorCode::kDisagreement,
                  fmt::format("{} (call {}): ranks disagree on {}: {} on rank {}, {} on rank {}",
                              call.operation, call.epoch, difference->field, difference->mine,
                              rank(), difference->theirs, peer),
                  {peer});
    }
    std::copy_n(message.lane_records, num_lanes() + 1, lane_records_[node].data());
  }
}

// Counts of a source: rows for each rank of the node, then its tokens.
void State::tell_node(const Call& call, const Announcement& own) {
  const int width = topology().ranks_per_node + 1;
  const int local_experts = call.record.num_experts / topology().num_ranks;
  for (int to = 0; to < context_.num_ranks(); ++to) {
    protocol::Mailbox& mailbox = context_.mailbox_of(to, call);
    std::int32_t* counts =
        mailbox.tokens_per_rank + std::int64_t{context_.rank()} * topology().num_nodes() * width;
    std::int32_t* experts =
        mailbox.tokens_per_expert +
        std::int64_t{context_.rank()} * protocol::ControlBlock::kMaxLocalExperts;
    if (own.tokens_per_expert != nullptr) std::fill_n(experts, local_experts, 0);
    for (int node = 0; node < topology().num_nodes(); ++node, counts += width) {
      const bool here = node == this->node();
      const std::int32_t* rows =
          here ? own.rows.data() + topology().rank_of(node, 0) : message_from(call, node).rows;
      std::copy_n(rows, topology().ranks_per_node, counts);
      counts[width - 1] = static_cast<std::int32_t>(
          here ? call.record.num_tokens : message_from(call, node).record.num_tokens);
      if (own.tokens_per_expert == nullptr) continue;
      const std::int32_t* tokens =
          here ? own.tokens_per_expert + std::int64_t{context_.global_rank(to)} * local_experts
               : experts_from(call, node) + std::int64_t{to} * local_experts;
      for (int e = 0; e < local_experts; ++e) experts[e] += tokens[e];
    }
  }
}

void State::announce(const Call& call, const Announcement& own, std::int64_t* wait_stats) {
  context_.check_fault(call);
  lane_records_.assign(topology().num_nodes(), std::vector<std::int32_t>(num_lanes() + 1, 0));
  post_rails(call, own);
  wait_rails(call, wait_stats);
  tell_node(call, own);
  context_.post(call);
}

void State::wait_announced(const Call& call, std::int64_t* wait_stats) {
  context_.wait_posted(call, wait_stats);
  const protocol::Mailbox& mailbox = context_.mailbox_of(context_.rank(), call);
  const int width = topology().ranks_per_node + 1;
  prefix_.resize(std::int64_t{context_.num_ranks()} * topology().num_ranks);
  for (int local = 0; local < context_.num_ranks(); ++local) {
    std::int32_t* prefix = prefix_.data() + std::int64_t{local} * topology().num_ranks;
    for (int source = 0; source < topology().num_ranks; ++source) {
      const std::int64_t row = std::int64_t{topology().index_of(source)} * topology().num_nodes() +
                               topology().node_of(source);
      prefix[source] = mailbox.tokens_per_rank[row * width + local];
    }
    require(plan::build_prefix_sum(prefix, topology().num_ranks),
            "the ranks send more than 2^31 - 1 rows to rank {}", context_.global_rank(local));
  }
}

std::int64_t State::num_tokens(const Call& call, int source) {
  const int width = topology().ranks_per_node + 1;
  const std::int64_t row = std::int64_t{topology().index_of(source)} * topology().num_nodes() +
                           topology().node_of(source);
  return context_.mailbox_of(context_.rank(), call).tokens_per_rank[row * width + width - 1];
}

std::int64_t State::tokens_of_expert(const Call& call, int expert) {
  const std::int32_t* counts = context_.mailbox_of(context_.rank(), call).tokens_per_expert;
  std::int64_t sum = 0;
  for (int local = 0; local < context_.num_ranks(); ++local)
    sum += counts[std::int64_t{local} * protocol::ControlBlock::kMaxLocalExperts + expert];
  return sum;
}

NetworkCounts State::counts() const {
  if (heap_ == nullptr) return {};
  const fabric::TransportCounts all = heap_->counts();
  return {rows_sent_.load(std::memory_order_relaxed), bytes_sent_.load(std::memory_order_relaxed),
          all.puts, all.put_bytes, all.signals};
}

bool State::poll() {
  bool some_lost = false;
  for_remote_ranks([&](int rank) {
    // First, since what it told came before.
    some_lost = heap_->lost(rank) || some_lost;
    // acquire: pairs with the signal in raise_fault() of that rank.
    if (block_.faulted[rank].reached(1)) adopt(block_.faults[rank]);
  });
  return some_lost;
}

bool State::lost(int rank) const { return heap_->lost(rank); }

std::uint64_t State::wait_mark(int rank) const {
  return protocol::load_relaxed(&block_.wait_mark[rank]);
}

void State::announce_wait(std::uint64_t mark) noexcept {
  for_remote_ranks([&](int to) {
    try {
      if (!heap_->lost(to)) heap_->signal(to, offset(&block_.wait_mark[rank()]), mark);
    } catch (...) {  // it is lost: who waits for it finds out
    }
  });
}

void State::adopt(const protocol::FaultRecord& record) {
  protocol::FaultRecord& own = *context_.own().fault;
  if (!own.claim()) return;
  own.code = record.code;
  own.origin = record.origin;
  own.num_ranks = record.num_ranks;
  std::copy_n(record.ranks, protocol::FaultRecord::kMaxRanks, own.ranks);
  std::memcpy(own.text, record.text, sizeof own.text);
  own.publish();
  context_.ring_doorbell(context_.rank());
}

void State::raise_fault(const Error& error) noexcept {
  // The first fault of this rank only: the memory that it is put from is not to change.
  if (heap_ == nullptr || told_fault_.exchange(true)) return;
  protocol::FaultRecord& record = *block_.out_fault;
  fill_record(record, error, rank());
  constexpr std::chrono::milliseconds kPatience(200);
  for_remote_ranks([&](int to) {
    try {
      heap_->put(to, offset(&block_.faults[rank()]), &record, sizeof record);
      heap_->signal(to, offset(&block_.faulted[rank()]), 1);
    } catch (...) {  // it is lost, and need not be told
    }
  });
  // This rank may leave as soon as its caller knows.
  for_remote_ranks([&](int to) {
    try {
      if (!heap_->lost(to)) (void)heap_->flush(to, kPatience);
    } catch (...) {
    }
  });
}

}  // namespace deep_ep::host::internode
