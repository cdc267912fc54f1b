#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/params.hpp"
#include "deep_ep/bootstrap.hpp"
#include "deep_ep/buffer.hpp"
#include "deep_ep/error.hpp"
#include "deep_ep/event.hpp"
#include "deep_ep/handle.hpp"
#include "deep_ep/tensor.hpp"

namespace deep_ep {

/// The seam between what a call means and the machine that does it. One object a Buffer; the modes
/// call it, in the order of the Buffer's calls, from the caller's thread or from work given to
/// submit().
class Backend {
 public:
  virtual ~Backend() = default;

  // -- memory
  /// Local: allocates the starting heap and returns what peers need to open it.
  virtual std::string export_handles() = 0;
  /// Collective: maps the peers' heaps.
  virtual void open_handles(const std::vector<std::string>& exported) = 0;
  /// Local, behind open_handles: what this rank found out that all ranks must go by.
  virtual std::string findings() { return {}; }
  /// Local: every rank's findings, in rank order. What throws here throws on all ranks.
  virtual void agree(const std::vector<std::string>& findings) { (void)findings; }
  /// How rows move, in words.
  virtual std::string transport() const { return {}; }
  /// A block that peers can write, for the results of one call; goes back when the last owner goes,
  /// on GPUs behind the work that `stream`, the caller's, has then. Outlives the backend.
  struct Results {
    fabric::Block block;
    std::byte* data = nullptr;
    std::shared_ptr<void> owner;
  };
  virtual Results allocate_results(std::int64_t bytes, Stream stream) = 0;
  /// The same for what nobody but the work of this call uses. Where `stream`, the caller's, is
  /// being captured, the graph has it for good.
  virtual Results allocate_scratch(std::int64_t bytes, Stream stream) {
    return allocate_results(bytes, stream);
  }
  /// A block that somebody else hands out: goes back behind the work of the streams that it is
  /// released on, and of no other.
  virtual Results allocate_mapped(std::int64_t bytes) = 0;
  /// Where `bytes` bytes of memory lie in what peers map of this rank; segment -1: they do not.
  virtual fabric::Block locate(const void* memory, std::int64_t bytes) const = 0;
  /// Memory of the device for what no peer writes: the views with data, in one block if that costs
  /// less.
  virtual std::vector<Tensor> allocate(std::vector<TensorView> views, Stream stream) = 0;
  /// The same, never of memory that peers map.
  virtual std::vector<Tensor> allocate_private(std::vector<TensorView> views, Stream stream) = 0;
  /// Local: grows until a block of `bytes` fits.
  virtual void reserve(std::int64_t bytes) = 0;
  virtual int num_segments() const = 0;
  /// Waits until so many segments of each rank are mapped here.
  virtual void wait_mapped(const std::vector<int>& num_segments) = 0;
  virtual std::int64_t mapped_bytes() const = 0;
  virtual std::int64_t live_bytes() const = 0;
  /// This rank's segment 0, behind the words by which ranks agree.
  virtual Tensor heap() const = 0;

  // -- order of work
  /// Of a call that submits twice: what has been waited for need not be waited for again, and only
  /// the end is an event.
  enum class Part { kWhole, kBegin, kEnd };
  /// Runs `work` on the communication stream, behind options.previous_event or the caller's stream.
  /// On the host it returns when that is done, or, with async_finish, when it is queued; then the
  /// event carries the Error of a work that threw, and `work` begins with await(). On GPUs `work`
  /// queues kernels, at once, and without async_finish the caller's stream waits for them.
  virtual EventHandle submit(const CallOptions& options, std::function<void()> work,
                             Part part = Part::kWhole) = 0;
  /// What submit() cannot queue: on the host, waits for options.previous_event. Throws the Error of
  /// that event's call, which then is one of `work` as well.
  virtual void await(const CallOptions& options) { (void)options; }
  /// Runs `work`, whose steps name their stream, on the caller's: behind what this Buffer has
  /// queued.
  virtual void run(const CallOptions& options, std::function<void()> work) = 0;
  /// The stream on which the work runs.
  virtual Stream comm_stream() const = 0;
  /// Steps return when they are queued, so that others can be queued behind them before they have
  /// run.
  virtual bool queues_steps() const { return false; }
  /// Waits for all queued work.
  virtual void synchronize() = 0;

  // -- faults
  /// Tells every rank that this Buffer is broken and why. The first fault stays.
  virtual void raise_fault(const Error& error) noexcept = 0;
  /// The fault of this Buffer as an Error, naming `operation`, or nothing.
  virtual std::optional<Error> fault(const char* operation) const = 0;
  /// Tells the peers that this rank leaves in good order, stops all threads, lets memory go. Local.
  virtual void close() = 0;

  // -- the steps of the modes
  virtual void get_dispatch_layout(const internode::LayoutParams& params) = 0;
  virtual void barrier(const intranode::BarrierParams& params) = 0;
  virtual void notify_dispatch(const intranode::NotifyDispatchParams& params) = 0;
  /// Returns when the counts are known that the last notify_dispatch tells the host, if it does.
  virtual void await_counts(const intranode::NotifyDispatchParams& params) { (void)params; }
  virtual void dispatch(const intranode::DispatchParams& params) = 0;
  virtual void group_rows(const intranode::GroupParams& params) = 0;
  virtual void reduce_rows(const intranode::ReduceParams& params) = 0;
  virtual void cached_notify_combine(const intranode::CombineParams& params) = 0;
  virtual void combine(const intranode::CombineParams& params) = 0;
  virtual void dispatch(const internode_ll::DispatchParams& params) = 0;
  virtual void combine(const internode_ll::CombineParams& params) = 0;
  // Masks: int32 [R], 1 for a rank that low latency leaves out. Behind the work queued so far.
  virtual void update_mask(int rank, bool masked, Stream stream) = 0;
  virtual void query_mask(std::int32_t* masks, Stream stream) = 0;
  virtual void clean_mask(Stream stream) = 0;

  // -- several nodes; a backend without them throws Error(kUnsupported)
  /// Collective: makes the symmetric heap, as large as this topology needs at least.
  virtual void alloc_symmetric(Bootstrap& bootstrap, std::int64_t bytes);
  virtual void free_symmetric() noexcept {}
  virtual void barrier(const internode::BarrierParams& params);
  virtual void notify_dispatch(const internode::NotifyDispatchParams& params);
  virtual void dispatch(const internode::DispatchParams& params);
  virtual void cached_notify(const internode::CombineParams& params);
  virtual void combine(const internode::CombineParams& params);
  virtual NetworkCounts network_counts() const { return {}; }
};

struct BackendOptions {
  Device device{};
  std::int64_t heap_bytes = 0;
  // plan::LowLatencyLayout: ahead of the heap, with several nodes in the symmetric one.
  std::int64_t low_latency_bytes = 0;
  bool enable_shrink = false;
  std::chrono::milliseconds timeout{0};  // for construction; calls bring their own
  int num_threads = 0;
  int rank = 0;
  int num_ranks = 1;
  plan::Topology topology{};
  int ranks_on_host = 1;     // of this machine, whatever nodes they are of
  bool one_process = false;  // all ranks are threads of this process
};

/// Bytes of segment 0 before what may be written between calls: the control block and the words of
/// low latency behind it.
inline std::int64_t words_bytes(const BackendOptions& options, std::int64_t control_bytes) {
  if (options.low_latency_bytes == 0 || options.topology.num_nodes() > 1) return control_bytes;
  return control_bytes + plan::LowLatencyLayout::words_bytes(options.num_ranks);
}

/// Throws Error(kUnsupported) if this build or machine has no backend for the device, saying what
/// is missing.
std::unique_ptr<Backend> make_backend(const BackendOptions& options);
std::unique_ptr<Backend> make_host_backend(const BackendOptions& options);

}  // namespace deep_ep
