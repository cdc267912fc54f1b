#pragma once

#include <cstring>

#include "plan/low_latency.hpp"
#include "protocol/atomic.hpp"
#include "protocol/schedule.hpp"

namespace deep_ep::host::internode_ll {

// A packet's words are plain memory: written before its tag is released, read behind an acquire of
// it.

/// release: pairs with has_tag().
template <class Words>
void put(plan::Packet& packet, std::uint32_t tag, const Words& words) {
  static_assert(sizeof words == plan::Packet::kBytes);
  protocol::schedule_point(protocol::Point::kPublish);
  std::memcpy(packet.words, &words, sizeof words);
  protocol::store_release(&packet.tag, tag);
}

/// acquire: pairs with put().
inline bool has_tag(const plan::Packet& packet, std::uint32_t tag) {
  return protocol::load_acquire(&packet.tag) == tag;
}

template <class Words>
Words read(const plan::Packet& packet) {
  static_assert(sizeof(Words) == plan::Packet::kBytes);
  Words words;
  std::memcpy(&words, packet.words, sizeof words);
  return words;
}

struct ThreeWords {
  std::uint32_t words[3];
};

}  // namespace deep_ep::host::internode_ll
