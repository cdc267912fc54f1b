#pragma once

#include <cstddef>
#include <cstdint>

#include "base/carver.hpp"
#include "plan/low_latency.hpp"

// Where low latency's messages lie between ranks that do not map each other's memory, so that they
// are put, on GPUs. Compiled by g++ and nvcc.
namespace deep_ep::plan {

/// Where messages of one kind lie in a stripe. Each is its head, in packets, and behind it its row,
/// if it has one, plainly: so one put moves it.
struct FarArea {
  std::int64_t begin = 0;
  std::int64_t head_bytes = 0;
  std::int64_t bytes = 0;       // of a message
  std::int64_t first_word = 0;  // of the words that say which messages are here

  DEEP_EP_HD std::int64_t at(std::int64_t message) const { return begin + message * bytes; }

  static FarArea of(const MessageArea& area, std::int64_t begin, std::int64_t first_word) {
    const std::int64_t head = area.head_packets * std::int64_t{sizeof(Packet)};
    return {begin, head, head + area.plain_bytes, first_word};
  }
};

/// A stripe is what one rank puts to another of one ticket: its call, with its counts, then its
/// messages. What is where depends on the call's shape, but stripes do not overlap whatever the
/// shapes, so that a rank that is late harms its own stripe only.
struct FarShape {
  std::int64_t call_bytes = 0;
  FarArea messages;
  FarArea returns;  // of a combine
  std::int64_t bytes = 0;
  std::int64_t words = 0;

  FarShape() = default;
  explicit FarShape(const LowLatencyPlaces& places) {
    call_bytes = (kCallPackets + places.count_packets) * std::int64_t{sizeof(Packet)};
    messages = FarArea::of(places.messages, call_bytes, 1);
    const std::int64_t count = places.messages.max_tokens;
    returns = FarArea::of(places.returns, messages.at(count), 1 + count);
    bytes = returns.at(places.returns.max_tokens);
    words = 1 + count + places.returns.max_tokens;
  }
};

/// In every rank's part of the symmetric heap; parts are as those of LowLatencyLayout.
struct FarLayout {
  static constexpr int kParts = LowLatencyLayout::kParts;

  std::byte* inbox = nullptr;   // [kParts, R, stripe_bytes] by source
  std::byte* mirror = nullptr;  // [kParts, R, stripe_bytes] by receiver: put from here
  std::uint64_t* words =
      nullptr;  // [kParts, R, stripe_words] by source: the ticket of what is here
  std::int64_t stripe_bytes = 0;
  std::int64_t stripe_words = 0;
  int num_ranks = 1;

  /// Room for whatever fits into `near`, whose heads and plain rows it has: heads take a rank's
  /// share of packets, 32 bytes a message at least, 48 with the head of its sum.
  DEEP_EP_HD static FarLayout carve(Carver& carver, const LowLatencyLayout& near) {
    constexpr std::int64_t kFewestBytesAWord = 24;
    FarLayout far;
    const std::int64_t ranks = near.num_ranks;
    far.num_ranks = near.num_ranks;
    const std::int64_t share = (near.packet_part_bytes + near.plain_part_bytes) / ranks + 1;
    far.stripe_bytes = (share + Carver::kAlignment - 1) / Carver::kAlignment * Carver::kAlignment;
    far.stripe_words = 1 + near.packet_part_bytes / ranks / kFewestBytesAWord;
    far.words = carver.take<std::uint64_t>(kParts * ranks * far.stripe_words);
    far.inbox = carver.take<std::byte>(kParts * ranks * far.stripe_bytes);
    far.mirror = carver.take<std::byte>(kParts * ranks * far.stripe_bytes);
    return far;
  }

  DEEP_EP_HD std::int64_t stripe(int part, int rank) const {
    return (std::int64_t{part} * num_ranks + rank) * stripe_bytes;
  }
  DEEP_EP_HD std::uint64_t* words_of(int part, int source) const {
    return words + (std::int64_t{part} * num_ranks + source) * stripe_words;
  }
};

}  // namespace deep_ep::plan
