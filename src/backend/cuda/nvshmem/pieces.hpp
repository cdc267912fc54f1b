#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "deep_ep/bootstrap.hpp"

namespace deep_ep::cuda::nvshmem {

/// The pieces that a process has of memory which is allocated by all ranks together and never
/// freed. All ranks add theirs in the same order, so that numbers mean the same everywhere. Whoever
/// uses it takes care that one thread does at a time.
class Pieces {
 public:
  struct Piece {
    std::byte* base = nullptr;
    std::int64_t bytes = 0;
    bool free = false;
  };

  /// Collective: a piece that has room on all ranks and that all of them have given back, or -1.
  int find_free(Bootstrap& bootstrap, std::int64_t bytes) const {
    std::string mine;
    for (const Piece& piece : pieces_) mine += piece.free && piece.bytes >= bytes ? '1' : '0';
    const std::vector<std::string> all = bootstrap.all_gather(mine);
    for (std::size_t i = 0; i < mine.size(); ++i) {
      if (std::all_of(all.begin(), all.end(),
                      [&](const std::string& one) { return i < one.size() && one[i] == '1'; }))
        return static_cast<int>(i);
    }
    return -1;
  }
  /// A new one, in use.
  int add(std::byte* base, std::int64_t bytes) {
    pieces_.push_back({base, bytes, false});
    return static_cast<int>(pieces_.size()) - 1;
  }
  const Piece& take(int number) {
    Piece& piece = pieces_.at(static_cast<std::size_t>(number));
    piece.free = false;
    return piece;
  }
  /// Local. `abandoned`: others may still write there, so that no rank gets this one any more.
  void give_back(int number, bool abandoned) {
    pieces_.at(static_cast<std::size_t>(number)).free = !abandoned;
  }

 private:
  std::vector<Piece> pieces_;
};

}  // namespace deep_ep::cuda::nvshmem
