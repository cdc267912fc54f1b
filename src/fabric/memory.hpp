#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace deep_ep::fabric {

/// A piece of memory mapped into this process. Unmaps on destruction.
class Mapping {
 public:
  virtual ~Mapping() = default;
  virtual std::byte* base() const = 0;
  virtual std::int64_t bytes() const = 0;
};

/// What a peer needs to map a segment: bytes, and a file descriptor if the kind of memory has one.
struct Descriptor {
  std::string bytes;
  int fd = -1;  // owned by whoever holds the Descriptor; -1: none
};

/// One kind of memory that other ranks can map: memfd on hosts, CUDA IPC or VMM on GPUs.
class Memory {
 public:
  virtual ~Memory() = default;
  /// Memory of this rank, zeroed. Throws Error(kOutOfMemory) with what was asked for and what there
  /// is.
  virtual std::shared_ptr<Mapping> allocate(std::int64_t bytes) = 0;
  /// The descriptor of memory that allocate() gave.
  virtual Descriptor describe(const Mapping& own) = 0;
  /// A peer's memory. The caller closes descriptor.fd.
  virtual std::shared_ptr<Mapping> map(const Descriptor& descriptor) = 0;
};

/// memfd_create + fallocate: counted against memory at once, never against the size of /dev/shm,
/// gone with its last process. Ranks that are threads of one process share one mapping, so that
/// race detectors see one address.
std::unique_ptr<Memory> make_memfd_memory();

/// Memory of this process alone, for what no peer touches: there at once, in huge pages where the
/// machine has them for the asking, which shared memory seldom gets. Zeroed; `bytes` is rounded up
/// to 2 MiB. Throws Error(kOutOfMemory).
std::shared_ptr<Mapping> allocate_private(std::int64_t bytes);

}  // namespace deep_ep::fabric
