#pragma once

#include <cstddef>
#include <cstdint>

#include "base/carver.hpp"
#include "protocol/epoch.hpp"

namespace deep_ep::plan {

/// The unit in which small things travel: twelve bytes and a tag that says of which call they are.
/// On GPUs one 16-byte access moves both, so who sees the tag has the bytes. Memory of packets
/// holds nothing but packets.
struct alignas(16) Packet {
  static constexpr int kBytes = 12;
  std::uint32_t words[3];
  std::uint32_t tag;
};

/// A low-latency call is one of two kinds, which number their calls (tickets) and have memory of
/// their own.
enum class LowLatencyKind : std::uint32_t { kDispatch, kCombine };

/// Tag of a ticket's packets: never 0, which is the tag of cleared memory; alike for no other call
/// within 2^31 - 1 tickets of either kind.
DEEP_EP_HD constexpr std::uint32_t packet_tag(LowLatencyKind kind, std::uint64_t ticket) {
  return 1 +
         static_cast<std::uint32_t>((2 * ticket + static_cast<std::uint32_t>(kind)) % 0xffffffffu);
}

/// What a call moves; the same on all ranks.
struct LowLatencyShape {
  int num_ranks = 1;
  int num_experts = 1;
  int num_topk = 1;
  std::int64_t max_tokens = 0;  // num_max_dispatch_tokens_per_rank
  std::int64_t row_bytes = 0;   // payload of one message

  DEEP_EP_HD int num_local_experts() const { return num_experts / num_ranks; }
};

/// What a source says to each rank ahead of its messages: packets at a place that depends on no
/// shape. Packet 0: messages for this rank, LowLatencyProtocol, tokens. The others: CallRecord.
constexpr int kCallPackets = 7;

enum class LowLatencyProtocol : std::uint32_t {
  kPackets,  // rows travel in packets
  kFlagged,  // rows are written plainly, their heads behind them
};

/// Entry of a message's head for one of its token's K experts.
struct HeadEntry {
  std::int32_t local_expert;  // -1: an expert of another rank, or none
  // Tokens of the same source with a smaller index that name this expert: the row's place among the
  // source's rows for the expert.
  std::int32_t index;
  float weight;
};
static_assert(sizeof(HeadEntry) == Packet::kBytes);

/// Where one kind of message lies, for all sources: heads always in packets; rows in packets or
/// plain. Message j of source s has number s * max_tokens + j. A row in packets takes them four at
/// a time, which carry 48 bytes: three accesses of 16.
struct MessageArea {
  static constexpr int kGroupPackets = 4;
  static constexpr int kGroupBytes = kGroupPackets * Packet::kBytes;

  Packet* heads = nullptr;
  Packet* rows = nullptr;
  std::byte* plain = nullptr;
  int head_packets = 0;           // of a message
  std::int64_t row_groups = 0;    // of a message
  std::int64_t plain_bytes = 0;   // of a message
  std::int64_t max_tokens = 0;    // messages of a source
  std::int64_t max_packeted = 0;  // of them the first ones have room in packets

  DEEP_EP_HD Packet* head(int source, std::int64_t message) const {
    return heads + (source * max_tokens + message) * head_packets;
  }
  DEEP_EP_HD Packet* row(int source, std::int64_t message) const {
    return rows + (source * max_packeted + message) * row_groups * kGroupPackets;
  }
  DEEP_EP_HD std::byte* plain_row(int source, std::int64_t message) const {
    return plain + (source * max_tokens + message) * plain_bytes;
  }
};

/// One receiver's memory for the messages of one ticket.
struct LowLatencyPlaces {
  Packet* calls = nullptr;   // [R, kCallPackets] by source
  Packet* counts = nullptr;  // [R, count_packets]: rows for each local expert, three a packet
  int count_packets = 0;
  MessageArea messages;           // dispatch: tokens; combine: weights, heads only
  MessageArea returns;            // combine: rows that come home, by the rank that sends them
  std::int64_t packet_bytes = 0;  // used, rows in packets excepted
  std::int64_t plain_bytes = 0;   // used

  DEEP_EP_HD Packet* call(int source) const { return calls + source * kCallPackets; }
  DEEP_EP_HD Packet* count(int source) const { return counts + source * count_packets; }
};

/// The one description of a rank's memory for low latency, `bytes` long. What lies where in the
/// large depends on `bytes` and the number of ranks alone, so calls of all shapes may follow each
/// other: control words, then for each kind and parity of a ticket a part for packets and a part
/// for plain rows. docs/memory.md has the formulas.
struct LowLatencyLayout {
  /// Rows in packets get so much, or an eighth of the memory; calls with more take plain rows.
  static constexpr std::int64_t kMaxPacketBytes = std::int64_t{64} << 20;
  static constexpr int kParts = 4;  // two kinds, two parities

  protocol::EpochFlag* consumed = nullptr;  // [kParts, R]: ticket whose messages the rank has read
  protocol::EpochFlag* arrived = nullptr;   // [kParts, R]: see arrived_from()
  std::byte* packets = nullptr;             // [kParts, packet_part_bytes]
  std::byte* plain = nullptr;               // [kParts, plain_part_bytes]
  std::int64_t packet_part_bytes = 0;
  std::int64_t plain_part_bytes = 0;
  int num_ranks = 1;

  DEEP_EP_HD static LowLatencyLayout carve(std::byte* base, std::int64_t bytes, int num_ranks) {
    LowLatencyLayout layout;
    layout.num_ranks = num_ranks;
    Carver carver(base);
    layout.consumed = carver.take<protocol::EpochFlag>(std::int64_t{kParts} * num_ranks);
    layout.arrived = carver.take<protocol::EpochFlag>(std::int64_t{kParts} * num_ranks);
    const std::int64_t rest = bytes > carver.used() ? align_down(bytes) - carver.used() : 0;
    // Rows take a third more in packets, and heads always need some.
    const std::int64_t most = rest / 8 > kMaxPacketBytes ? rest / 8 : kMaxPacketBytes;
    const std::int64_t share = rest / 7 * 4;
    layout.packet_part_bytes = align_down((share < most ? share : most) / kParts);
    layout.plain_part_bytes = align_down((rest - layout.packet_part_bytes * kParts) / kParts);
    layout.packets = carver.take<std::byte>(layout.packet_part_bytes * kParts);
    layout.plain = carver.take<std::byte>(layout.plain_part_bytes * kParts);
    return layout;
  }

  DEEP_EP_HD static int part(LowLatencyKind kind, std::uint64_t ticket) {
    return static_cast<int>(kind) * 2 + static_cast<int>(ticket % 2);
  }
  /// By `source`, which is told.
  DEEP_EP_HD protocol::EpochFlag& consumed_by(LowLatencyKind kind, std::uint64_t ticket,
                                              int reader) const {
    return consumed[part(kind, ticket) * num_ranks + reader];
  }
  /// How much of a ticket has come from `source`, if it is a rank of another node: it puts what it
  /// sends and sets this word behind it, first to call_arrived(), and with a combine's sums to
  /// returns_arrived().
  DEEP_EP_HD protocol::EpochFlag& arrived_from(LowLatencyKind kind, std::uint64_t ticket,
                                               int source) const {
    return arrived[part(kind, ticket) * num_ranks + source];
  }
  DEEP_EP_HD static constexpr std::uint64_t call_arrived(std::uint64_t ticket) {
    return 2 * ticket;
  }
  DEEP_EP_HD static constexpr std::uint64_t returns_arrived(std::uint64_t ticket) {
    return 2 * ticket + 1;
  }

  /// Places of a ticket's messages. Rows in packets get what is left of their part.
  DEEP_EP_HD LowLatencyPlaces places(LowLatencyKind kind, std::uint64_t ticket,
                                     const LowLatencyShape& shape) const;

  /// The fewest bytes in which calls of these shapes fit with all rows in packets, as far as
  /// kMaxPacketBytes goes.
  static std::int64_t bytes(const LowLatencyShape& dispatch, const LowLatencyShape& combine);
  /// Of the control words.
  static std::int64_t words_bytes(int num_ranks) {
    Carver carver(nullptr);
    carver.take<protocol::EpochFlag>(std::int64_t{kParts} * num_ranks);
    carver.take<protocol::EpochFlag>(std::int64_t{kParts} * num_ranks);
    return carver.used();
  }
  /// Whether calls of this shape fit at all.
  static bool fits(const LowLatencyShape& shape, LowLatencyKind kind, std::int64_t bytes);

 private:
  DEEP_EP_HD static constexpr std::int64_t align_down(std::int64_t bytes) {
    return bytes / Carver::kAlignment * Carver::kAlignment;
  }
};

DEEP_EP_HD constexpr std::int64_t row_groups(std::int64_t row_bytes) {
  return (row_bytes + MessageArea::kGroupBytes - 1) / MessageArea::kGroupBytes;
}

/// Measures with null bases. `packet_bytes` bounds the rows in packets; negative: no bound.
DEEP_EP_HD inline LowLatencyPlaces carve_places(std::byte* packets, std::int64_t packet_bytes,
                                                std::byte* plain, LowLatencyKind kind,
                                                const LowLatencyShape& shape) {
  LowLatencyPlaces places;
  const std::int64_t ranks = shape.num_ranks;
  const std::int64_t messages = ranks * shape.max_tokens;
  const bool combine = kind == LowLatencyKind::kCombine;
  places.count_packets = combine ? 0 : (shape.num_local_experts() + 2) / 3;
  Carver carver(packets);
  places.calls = carver.take<Packet>(ranks * kCallPackets);
  places.counts = carver.take<Packet>(ranks * places.count_packets);
  places.messages.max_tokens = shape.max_tokens;
  places.messages.head_packets = 1 + shape.num_topk;
  places.messages.heads = carver.take<Packet>(messages * places.messages.head_packets);
  if (combine) {
    places.returns.max_tokens = shape.max_tokens;
    places.returns.head_packets = 1;
    places.returns.heads = carver.take<Packet>(messages);
  }
  places.packet_bytes = carver.used();

  MessageArea& rows = combine ? places.returns : places.messages;
  rows.row_groups = row_groups(shape.row_bytes);
  const std::int64_t row_packets = rows.row_groups * MessageArea::kGroupPackets;
  const std::int64_t left =
      packet_bytes < 0 ? INT64_MAX : packet_bytes - places.packet_bytes - Carver::kAlignment;
  const std::int64_t room =
      left <= 0 ? 0 : left / (ranks * row_packets * static_cast<std::int64_t>(sizeof(Packet)));
  rows.max_packeted = room < shape.max_tokens ? room : shape.max_tokens;
  rows.rows = carver.take<Packet>(ranks * rows.max_packeted * row_packets);
  rows.plain_bytes = (shape.row_bytes + 15) / 16 * 16;
  Carver plain_carver(plain);
  rows.plain = plain_carver.take<std::byte>(messages * rows.plain_bytes);
  places.plain_bytes = plain_carver.used();
  return places;
}

DEEP_EP_HD inline LowLatencyPlaces LowLatencyLayout::places(LowLatencyKind kind,
                                                            std::uint64_t ticket,
                                                            const LowLatencyShape& shape) const {
  const int i = part(kind, ticket);
  return carve_places(packets + i * packet_part_bytes, packet_part_bytes,
                      plain + i * plain_part_bytes, kind, shape);
}

}  // namespace deep_ep::plan
