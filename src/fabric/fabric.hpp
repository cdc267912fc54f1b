#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fabric/memory.hpp"

namespace deep_ep::fabric {

/// The memory that the ranks of one node map of each other: every rank owns segments 0, 1, 2, ...;
/// segment 0 comes first and holds the control block. A connected socket joins each pair of ranks
/// (abstract Unix sockets, closed to other users); one helper thread a rank receives the peers' new
/// segments over it, maps them, and notices when a peer goes.
class Fabric {
 public:
  struct Callbacks {
    /// A peer closed its Fabric (orderly) or died. Called once a peer by the helper thread.
    std::function<void(int rank, bool orderly)> peer_gone;
    /// A peer's segment became usable. Called by the helper thread.
    std::function<void(int rank, int segment, std::byte* base)> segment_mapped;
  };

  Fabric(int rank, int num_ranks, std::unique_ptr<Memory> memory);
  /// close()s.
  ~Fabric();
  Fabric(const Fabric&) = delete;
  Fabric& operator=(const Fabric&) = delete;

  /// Allocates a segment of this rank and tells the connected peers; returns its index. `bytes` is
  /// rounded up to pages. Throws Error(kOutOfMemory); the Fabric is as before then.
  int add_segment(std::int64_t bytes);

  /// Where this rank can be reached: the bytes that open_handles of every rank needs. Starts to
  /// listen.
  std::string export_handles();
  /// Collective: joins all ranks from what each exported, in rank order, and maps the segments they
  /// have so far. Throws Error(kTimeout / kPeerFailed / kSystem) naming the ranks;
  /// Error(kUnsupported) if a rank is on another host.
  void open_handles(const std::vector<std::string>& exported, std::chrono::milliseconds timeout,
                    Callbacks callbacks);

  /// Base of a segment, own or a peer's; null while it is not mapped. Any thread, never blocks.
  std::byte* base(int rank, int segment) const noexcept;
  /// The same, but throws the Error(kSystem) of a segment that could not be mapped here.
  std::byte* mapped_base(int rank, int segment) const;
  /// Keeps an own segment mapped beyond this object's life.
  std::shared_ptr<Mapping> own_segment(int segment) const;
  int num_own_segments() const;
  /// Where `bytes` bytes of this process's memory lie in an own segment; segment -1: in none.
  struct Spot {
    int segment = -1;
    std::int64_t offset = 0;
  };
  Spot locate(const void* memory, std::int64_t bytes) const;
  std::int64_t own_bytes() const;

  int rank() const { return rank_; }
  int num_ranks() const { return num_ranks_; }

  /// Tells the peers, stops the helper thread, unmaps what nobody holds. Idempotent, local.
  void close();

 private:
  struct State;
  int rank_;
  int num_ranks_;
  std::unique_ptr<State> state_;
};

}  // namespace deep_ep::fabric
