#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "deep_ep/error.hpp"
#include "fabric/socket.hpp"

namespace deep_ep::fabric {

/// Who meets where.
struct Rendezvous {
  int rank = 0;
  int size = 1;
  std::string address;
  int port = 0;
  std::string secret;
  std::chrono::milliseconds timeout{0};

  std::string where() const { return address + ":" + std::to_string(port); }
};

/// Rank 0: listens until all have come, and no longer. Element i is the connection of rank i.
std::vector<Fd> gather_ranks(const Rendezvous& rendezvous);
/// Other ranks: the connection to rank 0, which may start later than this rank.
Fd join_root(const Rendezvous& rendezvous);

/// What crosses a new connection: a Hello and the secret to rank 0, an Answer and a text back.
struct Hello {
  static constexpr std::uint64_t kMagic = 0x3130706570656564;  // "deepep01"
  static constexpr std::uint32_t kMaxSecret = 4096;
  std::uint64_t magic = kMagic;
  std::int32_t rank = 0;
  std::int32_t size = 0;
  std::uint32_t secret_bytes = 0;
  std::uint32_t unused = 0;
};
struct Answer {
  static constexpr std::uint32_t kMaxText = 4096;
  std::uint64_t magic = Hello::kMagic;
  std::uint32_t code = 0;  // 0: welcome; else ErrorCode
  std::uint32_t text_bytes = 0;
};

}  // namespace deep_ep::fabric
