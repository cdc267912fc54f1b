#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cuda/comm.hpp"
#include "backend/cuda/event.hpp"
#include "backend/cuda/faults.hpp"
#include "fabric/fabric.hpp"

namespace deep_ep::cuda {

/// What the steps of a rank share: its GPU, its streams, the memory of all ranks as mapped here,
/// and what kernels need to know of it.
class Context {
 public:
  explicit Context(const BackendOptions& options);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  static std::int64_t control_bytes(int num_ranks) { return DeviceControl::bytes(num_ranks); }
  std::string export_handles(std::int64_t heap_bytes);
  void open_handles(const std::vector<std::string>& exported);
  /// A new segment of this rank; its index.
  int add_segment(std::int64_t bytes);

  int device() const { return device_; }
  int num_sms() const { return num_sms_; }
  cudaStream_t comm_stream() const { return comm_stream_; }
  fabric::Fabric& fabric() { return fabric_; }
  const std::shared_ptr<EventPool>& events() const { return events_; }
  const std::shared_ptr<Faults>& faults() const { return faults_; }

  /// What a kernel of `call` is given.
  Comm comm(const Call& call) const;
  /// Zeroed words for notify's parts; enough of them stay until the end.
  std::uint64_t* count_words(std::int64_t count);

  /// Tells all ranks, from a stream of its own, beside whatever runs.
  void raise_fault(const Error& error) noexcept;

 private:
  void set_base(int rank, int segment, std::byte* base);

  int rank_;
  int num_ranks_;
  int device_;
  int num_sms_ = 1;
  std::chrono::milliseconds timeout_;
  cudaStream_t comm_stream_ = nullptr;
  cudaStream_t fault_stream_ = nullptr;
  std::shared_ptr<EventPool> events_;
  std::shared_ptr<Faults> faults_;
  std::byte** segments_ = nullptr;     // [R, kMaxSegments], host memory that the GPU maps
  DeviceControl* controls_ = nullptr;  // [R], GPU memory
  LocalState* local_ = nullptr;        // GPU memory
  std::vector<void*> count_words_;     // GPU memory; the last is in use
  std::int64_t num_count_words_ = 0;
  fabric::Fabric fabric_;  // last: its helper thread uses the rest
};

}  // namespace deep_ep::cuda
