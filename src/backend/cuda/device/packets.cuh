#pragma once

#include "backend/cuda/device/ptx.cuh"
#include "plan/low_latency.hpp"

// 12 bytes and a tag that says what they are of, written and read by one access each: no fence.
namespace deep_ep::cuda {

__device__ inline void send_packet(plan::Packet* to, std::uint32_t a, std::uint32_t b,
                                   std::uint32_t c, std::uint32_t tag) {
  store_relaxed_sys_b128(to, {std::uint64_t{b} << 32 | a, std::uint64_t{tag} << 32 | c});
}

/// True, and the packet, if it has the tag.
__device__ inline bool take_packet(const plan::Packet* from, std::uint32_t tag,
                                   plan::Packet& packet) {
  const Words16 words = load_relaxed_sys_b128(from);
  packet.words[0] = static_cast<std::uint32_t>(words.low);
  packet.words[1] = static_cast<std::uint32_t>(words.low >> 32);
  packet.words[2] = static_cast<std::uint32_t>(words.high);
  return static_cast<std::uint32_t>(words.high >> 32) == tag;
}

}  // namespace deep_ep::cuda
