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

/// GPU memory that begins as zeros and grows. Earlier pieces stay, since a kernel that has not
/// begun may use them.
class ZeroedWords {
 public:
  ZeroedWords() = default;
  ~ZeroedWords();
  ZeroedWords(const ZeroedWords&) = delete;
  ZeroedWords& operator=(const ZeroedWords&) = delete;
  /// At least so many bytes; null if none were ever asked for.
  void* get(std::int64_t bytes);

 private:
  std::vector<void*> pieces_;  // the last is in use
  std::int64_t bytes_ = 0;
};

/// What the steps of a rank share: its GPU, its streams, the memory of all ranks as mapped here,
/// and what kernels need to know of it.
class Context {
 public:
  explicit Context(const BackendOptions& options);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  static std::int64_t control_bytes(const plan::Topology& topology) {
    return DeviceControl::bytes(topology.ranks_per_node, topology.num_nodes());
  }
  std::string export_handles(std::int64_t heap_bytes);
  void open_handles(const std::vector<std::string>& exported);
  /// A new segment of this rank; its index.
  int add_segment(std::int64_t bytes);

  int device() const { return device_; }
  const plan::Topology& topology() const { return topology_; }
  int rank() const { return rank_; }  // of the node, as below
  int num_ranks() const { return num_ranks_; }
  int global_rank() const { return first_rank_ + rank_; }
  int num_sms() const { return num_sms_; }
  cudaStream_t comm_stream() const { return comm_stream_; }
  /// What faults are told on, beside whatever runs.
  cudaStream_t fault_stream() const { return fault_stream_; }
  fabric::Fabric& fabric() { return fabric_; }
  const std::shared_ptr<EventPool>& events() const { return events_; }
  const std::shared_ptr<Faults>& faults() const { return faults_; }

  /// What a kernel of `call` is given.
  Comm comm(const Call& call) const;
  /// For notify's parts: words of earlier kernels, tagged with their epoch.
  std::uint64_t* count_words(std::int64_t count) {
    return static_cast<std::uint64_t*>(count_words_.get(count * 8));
  }
  /// For layout's sums, which leaves zeros behind.
  std::int32_t* sum_words(std::int64_t count) {
    return static_cast<std::int32_t*>(sum_words_.get(count * 4));
  }

  /// A number for a notify whose counts the host waits for. Throws Error(kUsage) in a capture.
  std::uint64_t take_ticket(const char* operation);
  /// Waits until the kernel with the ticket has told its counts, and gives them.
  const HostStatus& await_ticket(const char* operation, std::uint64_t ticket) const;
  /// Waits for the communication stream and throws what kernels have found.
  void finish(const char* operation) const;

  /// Waits for the calls and for what was told of faults.
  void synchronize() noexcept;
  /// Tells all ranks, from a stream of its own, beside whatever runs.
  void raise_fault(const Error& error) noexcept;

 private:
  void set_base(int rank, int segment, std::byte* base) noexcept;

  plan::Topology topology_;
  int first_rank_;  // of the node; other ranks are counted from there
  int rank_;
  int num_ranks_;
  int device_;
  int num_sms_ = 1;
  std::chrono::milliseconds timeout_;
  cudaStream_t comm_stream_ = nullptr;
  cudaStream_t fault_stream_ = nullptr;
  std::shared_ptr<EventPool> events_;
  std::shared_ptr<Faults> faults_;
  std::byte** mapped_segments_ = nullptr;  // [R, kMaxSegments], host memory that the GPU reads
  std::byte** known_segments_ = nullptr;   // the same, GPU memory
  LocalState* local_ = nullptr;            // GPU memory
  ZeroedWords count_words_;
  ZeroedWords sum_words_;
  std::uint64_t ticket_ = 0;
  fabric::Fabric fabric_;  // last: its helper thread uses the rest
};

}  // namespace deep_ep::cuda
