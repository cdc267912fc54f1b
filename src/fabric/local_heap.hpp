#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "deep_ep/bootstrap.hpp"
#include "fabric/symmetric_heap_factory.hpp"

namespace deep_ep::fabric {

struct LocalPiece;

/// The symmetric heap of ranks that are threads of one process: plain memory, which others write
/// directly. Puts are copies, signals are release stores.
class LocalHeap final : public SymmetricHeap {
 public:
  /// Collective. options.on_signal is called by who sets a word of this rank's heap, and by who
  /// leaves. Throws Error(kOutOfMemory), on all ranks if on one.
  LocalHeap(Bootstrap& bootstrap, const SymmetricHeapOptions& options);
  /// To the others this rank is lost from now on; what they write still has a place to go.
  ~LocalHeap() override;

  std::byte* base() const noexcept override;
  std::int64_t bytes() const noexcept override;
  void put(int rank, std::int64_t offset, const void* source, std::int64_t bytes) override;
  void signal(int rank, std::int64_t offset, std::uint64_t value) override;
  bool flush(int rank, std::chrono::milliseconds timeout) override;
  bool lost(int rank) const noexcept override;
  TransportCounts counts() const noexcept override;

 private:
  LocalPiece& piece_of(int rank, std::int64_t offset, std::int64_t bytes) const;

  int rank_;
  std::shared_ptr<LocalPiece> own_;
  std::vector<std::shared_ptr<LocalPiece>> pieces_;  // by rank
  std::atomic<std::int64_t> puts_{0};
  std::atomic<std::int64_t> put_bytes_{0};
  std::atomic<std::int64_t> signals_{0};
};

}  // namespace deep_ep::fabric
