#include "backend/cuda/context.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/internode_ll/steps.hpp"
#include "backend/cuda/intranode/steps.hpp"
#include "backend/cuda/memory/memory.hpp"
#include "backend/cuda/memory/zero.hpp"
#include "base/log.hpp"
#include "fabric/segment_table.hpp"

namespace deep_ep::cuda {

namespace {

constexpr int kMaxSegments = fabric::SegmentTable::kMaxSegments;

/// Of a GPU that this library can use.
std::unique_ptr<fabric::Memory> make_checked_memory(int device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    (void)cudaGetLastError();
    throw Error(ErrorCode::kUnsupported, fmt::format("device cuda: no GPU can be used here ({})",
                                                     cudaGetErrorString(status)));
  }
  require(device >= 0 && device < count, "device.index is {}, this process sees {} GPUs", device,
          count);
  const DeviceGuard guard(device);
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  if (major < 9) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("device cuda {}: compute capability {}.x, 9.0 (Hopper) is needed",
                            device, major));
  }
  return make_memory(device);
}

template <class T>
T* allocate_zeroed(std::size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  zero(memory, count * sizeof(T));
  return static_cast<T*>(memory);
}

}  // namespace

ZeroedWords::~ZeroedWords() {
  for (void* piece : pieces_) (void)cudaFree(piece);
}

void* ZeroedWords::get(std::int64_t bytes) {
  if (bytes > bytes_) {
    const RelaxedCapture relaxed;
    const std::int64_t more = std::max(bytes, 2 * bytes_);
    pieces_.push_back(allocate_zeroed<std::byte>(static_cast<std::size_t>(more)));
    bytes_ = more;
  }
  return pieces_.empty() ? nullptr : pieces_.back();
}

namespace {

// Our kernels are short of SMs, not of work: they go before the caller's.
cudaStream_t make_stream() {
  int least = 0;
  int greatest = 0;
  cudaStream_t stream = nullptr;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
  return stream;
}

/// Communication streams are kept for the next Buffer, never destroyed: an allocator that was told
/// of one records events on it long after its Buffer is gone.
class CommStreams {
 public:
  cudaStream_t take(int device) {
    const std::lock_guard lock(mutex_);
    std::vector<cudaStream_t>& free = free_[device];
    if (free.empty()) return make_stream();
    cudaStream_t stream = free.back();
    free.pop_back();
    return stream;
  }
  void give_back(int device, cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    free_[device].push_back(stream);
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<cudaStream_t>> free_;
};
CommStreams& comm_streams() {
  static auto* streams = new CommStreams;  // outlives every static that holds a Buffer
  return *streams;
}

}  // namespace

Context::Context(const BackendOptions& options)
    : topology_(options.topology),
      first_rank_(options.rank - topology_.index_of(options.rank)),
      rank_(topology_.index_of(options.rank)),
      num_ranks_(topology_.ranks_per_node),
      device_(options.device.index),
      timeout_(options.timeout),
      fabric_(rank_, num_ranks_, make_checked_memory(options.device.index)) {
  if (num_ranks_ > kMaxRanks) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("{} ranks; one node of GPUs has {} at most", num_ranks_, kMaxRanks));
  }
  const DeviceGuard guard(device_);
  check(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device_),
        "cudaDeviceGetAttribute");
  comm_stream_ = comm_streams().take(device_);
  fault_stream_ = make_stream();
  events_ = std::make_shared<EventPool>(device_);
  faults_ = std::make_shared<Faults>(global_rank(), topology_.num_nodes() > 1);
  const std::size_t num_segments = static_cast<std::size_t>(num_ranks_) * kMaxSegments;
  void* mapped = nullptr;
  check(cudaHostAlloc(&mapped, num_segments * sizeof(std::byte*), cudaHostAllocMapped),
        "cudaHostAlloc");
  mapped_segments_ = static_cast<std::byte**>(mapped);
  std::fill_n(mapped_segments_, num_segments, nullptr);
  known_segments_ = allocate_zeroed<std::byte*>(num_segments);
  // Loading a kernel later could wait for those that run, which may wait for it.
  check(intranode::load_kernels(), "loading of the kernels");
  for (const auto load : {internode_ll::load_dispatch, internode_ll::load_combine,
                          internode_ll::load_wire_combine, internode_ll::load_mask})
    check(load(), "loading of the kernels");
  local_ = allocate_zeroed<LocalState>(1);
}

Context::~Context() {
  fabric_.close();
  const DeviceGuard guard(device_, std::nothrow);
  comm_streams().give_back(device_, comm_stream_);
  (void)cudaStreamDestroy(fault_stream_);
  (void)cudaFree(local_);
  (void)cudaFree(known_segments_);
  (void)cudaFreeHost(mapped_segments_);
}

// By a plain store, since a kernel may be waiting for it: mapping does not wait for kernels, but a
// copy does while another thread frees memory or loads a kernel, which wait for that kernel.
void Context::set_base(int rank, int segment, std::byte* base) noexcept {
  // release: pairs with the acquire in segment_base().
  protocol::store_release(reinterpret_cast<std::uint64_t*>(
                              mapped_segments_ + std::int64_t{rank} * kMaxSegments + segment),
                          std::uint64_t{reinterpret_cast<std::uintptr_t>(base)});
}

int Context::add_segment(std::int64_t bytes) {
  const int segment = fabric_.add_segment(bytes);
  set_base(rank_, segment, fabric_.base(rank_, segment));
  return segment;
}

std::string Context::export_handles(std::int64_t heap_bytes) {
  (void)add_segment(heap_bytes);
  return fabric_.export_handles();
}

void Context::open_handles(const std::vector<std::string>& exported) {
  const auto first = exported.begin() + first_rank_;
  fabric_.open_handles(
      {first, first + num_ranks_}, timeout_,
      {.peer_gone =
           [this](int rank, bool orderly) {
             protocol::store_release(&faults_->status().gone[rank],
                                     orderly ? kGoneOrderly : kGoneDead);
           },
       .segment_mapped = [this](int rank, int segment,
                                std::byte* base) { set_base(rank, segment, base); }});
}

Comm Context::comm(const Call& call) const {
  Comm comm;
  comm.rank = rank_;
  comm.num_ranks = num_ranks_;
  comm.num_nodes = topology_.num_nodes();
  comm.first_rank = first_rank_;
  for (int i = 0; i < num_ranks_; ++i) comm.bases[i] = fabric_.base(i, 0);
  comm.mapped_segments = mapped_segments_;
  comm.known_segments = known_segments_;
  comm.num_segments = kMaxSegments;
  comm.local = local_;
  comm.status = &faults_->status();
  comm.timeout_ns = std::chrono::nanoseconds(call.timeout).count();
  comm.record = call.record;
  return comm;
}

std::uint64_t Context::take_ticket(const char* operation) {
  if (is_capturing(comm_stream_)) {
    throw Error(
        ErrorCode::kUsage,
        fmt::format("{} waits for counts on the host, which a stream that is being captured "
                    "cannot: pass num_worst_tokens or a handle",
                    operation));
  }
  return ++ticket_;
}

const HostStatus& Context::await_ticket(const char* operation, std::uint64_t ticket) const {
  const HostStatus& status = faults_->status();
  using Clock = std::chrono::steady_clock;
  // The kernel has a timeout of its own; here it is only looked at whether it still runs.
  constexpr std::chrono::milliseconds kLookEvery{1};
  Clock::time_point next_look = Clock::now() + kLookEvery;
  // acquire: pairs with the release in tell_host().
  while (protocol::load_acquire(&status.ticket) != ticket) {
    if (Clock::now() < next_look) continue;
    next_look += kLookEvery;
    const RelaxedCapture relaxed;
    const cudaError_t running = cudaStreamQuery(comm_stream_);
    if (running == cudaErrorNotReady) continue;
    check(running, "notify");
    if (protocol::load_acquire(&status.ticket) == ticket) break;
    if (std::optional<Error> error = faults_->error(operation)) throw Error(*error);
    throw Error(ErrorCode::kSystem, "notify ended without counts");
  }
  if (std::optional<Error> error = faults_->error(operation)) throw Error(*error);
  return status;
}

void Context::finish(const char* operation) const {
  check(cudaStreamSynchronize(comm_stream_), operation);
  if (std::optional<Error> error = faults_->error(operation)) throw Error(*error);
}

void Context::synchronize() noexcept {
  const DeviceGuard guard(device_, std::nothrow);
  (void)cudaStreamSynchronize(comm_stream_);
  (void)cudaStreamSynchronize(fault_stream_);
}

void Context::raise_fault(const Error& error) noexcept {
  try {
    const DeviceGuard guard(device_);
    intranode::FaultArgs args;
    args.comm = comm({});
    protocol::FaultRecord& record = args.record;
    std::memset(&record, 0, sizeof record);
    record.code = static_cast<std::uint32_t>(error.code());
    record.origin = global_rank();
    record.num_ranks = static_cast<std::int32_t>(
        std::min<std::size_t>(error.ranks().size(), protocol::FaultRecord::kMaxRanks));
    std::copy_n(error.ranks().begin(), record.num_ranks, record.ranks);
    record.finding = protocol::Finding::kText;
    std::strncpy(record.text, error.what(), protocol::FaultRecord::kTextBytes - 1);
    check(intranode::launch_fault(args, fault_stream_), "launch of fault");
  } catch (const std::exception& failure) {
    log::warn("rank {}: the other ranks cannot be told of a fault: {}", global_rank(),
              failure.what());
  }
}

}  // namespace deep_ep::cuda
