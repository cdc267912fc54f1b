#pragma once

#include <memory>

#include "fabric/memory.hpp"

namespace deep_ep::cuda {

// Memory of a GPU that other processes of the node can map. What becomes of a writer when the
// owner dies decides between the two: docs/adr/0007-gpu-memory-outlives-its-owner.md.

/// cuMemCreate, handed on as a file descriptor: lives until the last process that maps it lets go.
std::unique_ptr<fabric::Memory> make_vmm_memory(int device);

/// cudaMalloc, handed on as a CUDA IPC handle: for drivers and machines without the former.
std::unique_ptr<fabric::Memory> make_ipc_memory(int device);

/// Whether `device` can do make_vmm_memory().
bool has_vmm(int device);

inline std::unique_ptr<fabric::Memory> make_memory(int device) {
  return has_vmm(device) ? make_vmm_memory(device) : make_ipc_memory(device);
}

}  // namespace deep_ep::cuda
