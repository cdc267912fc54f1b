#include "backend/host/internode_ll/calls.hpp"

#include <algorithm>

#include "backend/agreement.hpp"
#include "backend/host/internode_ll/packets.hpp"
#include "base/error.hpp"

namespace deep_ep::host::internode_ll {

using plan::LowLatencyKind;
using plan::LowLatencyLayout;

namespace {

using protocol::CallRecord;

constexpr int kHiddenField = 2;  // of CallRecord::agreed(): the one that may need 64 bits
constexpr int kNumWords = (plan::kCallPackets - 1) * 3;
static_assert(kNumWords > CallRecord::kNumAgreed);

void write_record(const CallRecord& record, std::uint32_t* words) {
  for (int i = 0; i < CallRecord::kNumAgreed; ++i)
    words[i] = static_cast<std::uint32_t>(record.agreed(i));
  words[CallRecord::kNumAgreed] = static_cast<std::uint32_t>(record.agreed(kHiddenField) >> 32);
}

std::int64_t agreed_field(const std::uint32_t* words, int i) {
  if (i != kHiddenField) return static_cast<std::int32_t>(words[i]);
  return static_cast<std::int64_t>(std::uint64_t{words[CallRecord::kNumAgreed]} << 32 | words[i]);
}

}  // namespace

Exchange::Exchange(State& state, LowLatencyKind kind, const deep_ep::internode_ll::Step& step)
    : state_(state), kind_(kind), step_(step), calls_(state.num_ranks()) {
  if (step.wait_stats != nullptr) longest_wait_.assign(state.num_ranks(), 0);
}

Exchange::~Exchange() {
  for (std::size_t i = 0; i < longest_wait_.size(); ++i) step_.wait_stats[i] += longest_wait_[i];
}

void Exchange::begin_send() {
  ticket_ = state_.take_ticket(kind_);
  if (step_.ticket != nullptr) *step_.ticket = ticket_;
  find_places();
  state_.wait_consumed(step_.call, kind_, ticket_);
}

void Exchange::find_ticket() {
  ticket_ = *step_.ticket;
  find_places();
}

void Exchange::find_places() {
  for (int i = 0; i < state_.num_ranks(); ++i)
    places_.push_back(state_.places(i, kind_, ticket_, step_.shape));
}

void Exchange::publish_call(int rank, std::int32_t num_messages) {
  std::uint32_t words[kNumWords] = {};
  write_record(step_.call.record, words);
  plan::Packet* packets = to(rank).call();
  const auto protocol = static_cast<std::uint32_t>(plan::LowLatencyProtocol::kFlagged);
  put(packets[0], tag(),
      ThreeWords{{static_cast<std::uint32_t>(num_messages), protocol,
                  static_cast<std::uint32_t>(step_.call.record.num_tokens)}});
  for (int i = 0; i + 1 < plan::kCallPackets; ++i)
    put(packets[i + 1], tag(), ThreeWords{{words[3 * i], words[3 * i + 1], words[3 * i + 2]}});
  if (state_.remote(rank)) {
    put_part(rank, own().call(state_.rank()), packets, plan::kCallPackets);
    state_.signal_arrived(rank, kind_, ticket_, LowLatencyLayout::call_arrived(ticket_));
  }
  state_.ring_doorbell(rank);
}

bool Exchange::call_is_here(int source) const {
  // acquire: pairs with publish_call() of the source: its signal, or the packet that it writes
  // last.
  if (state_.remote(source))
    return state_.has_arrived(source, kind_, ticket_, LowLatencyLayout::call_arrived(ticket_));
  return has_tag(own().call(source)[plan::kCallPackets - 1], tag());
}

void Exchange::put_messages(int rank, std::int64_t num_messages) {
  if (!state_.remote(rank)) return;
  put_area(rank, &plan::LowLatencyPlaces::messages, num_messages);
  put_part(rank, own().count(state_.rank()), to(rank).counts(), own().count_packets);
}

void Exchange::publish_returns(int rank, std::int64_t num_returns) {
  // Without sums there is no word: nobody would wait for it, and it could come late.
  if (state_.remote(rank) && num_returns > 0) {
    put_area(rank, &plan::LowLatencyPlaces::returns, num_returns);
    state_.signal_arrived(rank, kind_, ticket_, LowLatencyLayout::returns_arrived(ticket_));
  }
  state_.ring_doorbell(rank);
}

std::int32_t Exchange::count_returns(int rank, std::int32_t known, std::int32_t expected) const {
  // acquire: pairs with publish_returns() of the rank, or with the packet behind each of its sums.
  if (state_.remote(rank) &&
      !state_.has_arrived(rank, kind_, ticket_, LowLatencyLayout::returns_arrived(ticket_)))
    return known;
  while (known < expected && has_tag(*own().returns.head(rank, known), tag())) ++known;
  return known;
}

void Exchange::put_area(int rank, plan::MessageArea plan::LowLatencyPlaces::*area,
                        std::int64_t num_messages) {
  const plan::MessageArea& here = own().*area;
  const plan::MessageArea& mirror = places_[rank].*area;
  const int self = state_.rank();
  put_part(rank, here.head(self, 0), mirror.head(rank, 0), num_messages * here.head_packets);
  if (here.plain == nullptr) return;  // a combine's weights: heads only
  put_part(rank, here.plain_row(self, 0), mirror.plain_row(rank, 0),
           num_messages * here.plain_bytes);
  state_.count_rows(num_messages, num_messages * here.plain_bytes);
}

void Exchange::wait_calls() {
  start_waiting();
  const auto look = [&] {
    bool all = true;
    for (int i = 0; i < state_.num_ranks(); ++i) {
      if (calls_[i].here || state_.masked(i)) continue;
      if (call_is_here(i)) {
        calls_[i].here = true;
        arrived(i);
      } else {
        all = false;
      }
    }
    return all;
  };
  state_.wait(step_.call, "its call", look, [&] {
    std::vector<Missing> missing;
    for (int i = 0; i < state_.num_ranks(); ++i)
      if (!calls_[i].here && !state_.masked(i))
        missing.push_back({i, step_.call.epoch, step_.call.epoch - 1});
    return missing;
  });
  for (int i = 0; i < state_.num_ranks(); ++i)
    if (calls_[i].here) check_agreement(i);
}

// I9: before anything else of the source is used.
void Exchange::check_agreement(int source) {
  const plan::Packet* packets = own().call(source);
  std::uint32_t words[kNumWords];
  for (int i = 0; i + 1 < plan::kCallPackets; ++i) {
    const auto three = read<ThreeWords>(packets[i + 1]);
    std::copy_n(three.words, 3, words + 3 * i);
  }
  const Call& call = step_.call;
  for (int i = 0; i < CallRecord::kNumAgreed; ++i) {
    const std::int64_t mine = call.record.agreed(i);
    const std::int64_t theirs = agreed_field(words, i);
    if (mine == theirs) continue;
    const Difference difference = describe_difference(i, mine, theirs);
    throw Error(ErrorCode::kDisagreement,
                fmt::format("{} (call {}): ranks disagree on {}: {} on rank {}, {} on rank {}",
                            call.operation, call.epoch, difference.field, difference.mine,
                            state_.rank(), difference.theirs, source),
                {source});
  }
  const auto messages = static_cast<std::int32_t>(read<ThreeWords>(packets[0]).words[0]);
  if (messages < 0 || messages > step_.shape.max_tokens) {
    throw Error(ErrorCode::kPeerFailed,
                fmt::format("{} (call {}) on rank {}: rank {} announces {} rows, at most {} are "
                            "possible",
                            call.operation, call.epoch, state_.rank(), source, messages,
                            step_.shape.max_tokens),
                {source});
  }
  calls_[source].num_messages = messages;
}

void Exchange::arrived(int rank) {
  if (longest_wait_.empty()) return;
  const auto waited = std::chrono::steady_clock::now() - waiting_since_;
  longest_wait_[rank] =
      std::max<std::int64_t>(longest_wait_[rank], waited / std::chrono::nanoseconds(1));
}

}  // namespace deep_ep::host::internode_ll
