#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_ep::cuda::nvshmem {

/// A piece of NVSHMEM's symmetric heap: memory of this rank's GPU, which kernels of all ranks write
/// by its address here. Zero at first, 128-byte aligned. Destroying it is local: the piece serves a
/// later Buffer of the same ranks.
class Heap {
 public:
  virtual ~Heap() = default;
  virtual std::byte* base() const noexcept = 0;
  virtual std::int64_t bytes() const noexcept = 0;
  /// The piece of `rank`, as kernels here may write it, or null: then it is put to.
  virtual std::byte* mapped(int rank) const noexcept = 0;
  /// After a fault: others may still write to it, so that nobody gets it any more.
  virtual void abandon() noexcept = 0;
};

}  // namespace deep_ep::cuda::nvshmem
