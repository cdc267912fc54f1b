#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "backend/cuda/nvshmem/heap.hpp"
#include "backend/cuda/nvshmem/pieces.hpp"
#include "deep_ep/bootstrap.hpp"

namespace deep_ep::cuda::nvshmem {

/// This process's part in NVSHMEM, which it joins once and never leaves: with the ranks and the GPU
/// of its first Buffer over several nodes.
class World {
 public:
  static World& instance();

  /// Collective: memory of at least `bytes` bytes a rank, after joining if need be. Throws
  /// Error(kUnsupported) on all ranks if they are not those that joined, or if NVSHMEM cannot
  /// connect them; Error(kOutOfMemory).
  std::unique_ptr<Heap> allocate(Bootstrap& bootstrap, int device, std::int64_t bytes);

 private:
  class PieceHeap;

  void join(Bootstrap& bootstrap, int device);
  void init(Bootstrap& bootstrap, int device, const std::string& unique_id);

  std::mutex mutex_;  // one collective call at a time; guards what follows
  std::string name_;  // the same on all its ranks; empty before joining
  int rank_ = 0;
  int size_ = 0;
  int device_ = 0;
  Pieces pieces_;
};

}  // namespace deep_ep::cuda::nvshmem
