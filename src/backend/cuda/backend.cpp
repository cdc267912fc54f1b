#include <algorithm>
#include <thread>

#include "backend/cuda/check.hpp"
#include "backend/cuda/context.hpp"
#include "backend/cuda/device_heap.hpp"
#include "backend/cuda/groups.hpp"
#include "backend/cuda/internode.hpp"
#include "backend/cuda/intranode/steps.hpp"
#include "backend/cuda/low_latency.hpp"
#include "backend/cuda/make_backend.hpp"
#include "backend/cuda/memory/memory.hpp"
#include "backend/cuda/stream_order.hpp"
#include "base/log.hpp"

namespace deep_ep::cuda {

namespace {

// Growth in steps of this size keeps the number of segments small; a GPU maps memory in pieces of
// 2 MiB.
constexpr std::int64_t kGrowthBytes = 32 << 20;

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream.native); }

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const BackendOptions& options)
      : options_(options),
        context_(options),
        internode_(context_, options),
        low_latency_(context_, internode_, options),
        heap_(std::make_shared<DeviceHeap>(
            context_, [this](std::int64_t bytes) { return grow(bytes); },
            [this](int segment) { return context_.fabric().own_segment(segment); })),
        private_heap_(std::make_shared<DeviceHeap>(
            context_, [this](std::int64_t bytes) { return grow_private(bytes); },
            [this](int segment) { return private_segments_[static_cast<std::size_t>(segment)]; })) {
  }

  ~CudaBackend() override { close(); }

  std::string export_handles() override {
    const std::int64_t control = Context::control_bytes(options_.topology);
    const std::int64_t bytes = std::max(options_.heap_bytes, control);
    if (options_.heap_bytes < control && options_.heap_bytes > 0) {
      log::info("num_nvl_bytes raised from {} to {}: the control block needs that",
                options_.heap_bytes, control);
    }
    // Over several nodes it is in the symmetric heap.
    const std::int64_t low_latency =
        options_.topology.num_nodes() > 1 ? 0 : options_.low_latency_bytes;
    std::string handles = context_.export_handles(bytes + low_latency);
    heap_->add(0, control + low_latency, context_.fabric().own_segment(0)->bytes());
    return handles;
  }

  void open_handles(const std::vector<std::string>& exported) override {
    context_.open_handles(exported);
  }
  std::string transport() const override {
    const char* inside = has_vmm(context_.device())
                             ? "GPU memory mapped by file descriptor, rows pushed by SMs"
                             : "GPU memory mapped by CUDA IPC, rows pushed by SMs";
    if (!internode_.open()) return inside;
    return fmt::format("{} nodes of {} ranks: {}; NVSHMEM between them",
                       options_.topology.num_nodes(), options_.topology.ranks_per_node, inside);
  }

  Results allocate_results(std::int64_t bytes, Stream stream) override {
    return heap_->allocate(bytes, native(stream));
  }
  Results allocate_scratch(std::int64_t bytes, Stream stream) override {
    // The communication stream joins a capture with the work, which comes later.
    const bool captured = is_capturing(native(stream));
    return heap_->allocate(bytes, captured ? native(stream) : context_.comm_stream());
  }
  Results allocate_mapped(std::int64_t bytes) override { return heap_->allocate_raw(bytes); }
  fabric::Block locate(const void* memory, std::int64_t bytes) const override {
    const fabric::Fabric::Spot spot = context_.fabric().locate(memory, bytes);
    return {spot.segment, spot.offset, bytes};
  }

  std::vector<Tensor> allocate(std::vector<TensorView> views, Stream stream) override {
    return allocate_from(*heap_, std::move(views), stream);
  }
  std::vector<Tensor> allocate_private(std::vector<TensorView> views, Stream stream) override {
    return allocate_from(*private_heap_, std::move(views), stream);
  }

  void reserve(std::int64_t bytes) override { heap_->reserve(bytes); }
  int num_segments() const override { return context_.fabric().num_own_segments(); }

  void wait_mapped(const std::vector<int>& num_segments) override {
    const auto deadline = std::chrono::steady_clock::now() + options_.timeout;
    for (int i = 0; i < context_.num_ranks(); ++i) {
      const int rank = context_.global_rank() - context_.rank() + i;
      while (context_.fabric().mapped_base(i, num_segments[rank] - 1) == nullptr) {
        if (std::chrono::steady_clock::now() > deadline) {
          throw Error(
              ErrorCode::kTimeout,
              fmt::format("reserve on rank {}: segment {} of rank {} was not mapped within "
                          "{} ms",
                          options_.rank, num_segments[rank] - 1, rank, options_.timeout.count()),
              {rank});
        }
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    }
  }

  std::int64_t mapped_bytes() const override { return context_.fabric().own_bytes(); }
  std::int64_t live_bytes() const override { return heap_->live_bytes(); }
  NetworkCounts network_counts() const override { return internode_.counts(); }

  Tensor heap() const override {
    std::shared_ptr<fabric::Mapping> mapping = context_.fabric().own_segment(0);
    const std::int64_t begin = words_bytes(options_, Context::control_bytes(options_.topology));
    return {TensorView(mapping->base() + begin, DType::kUint8, {mapping->bytes() - begin},
                       options_.device),
            mapping};
  }

  EventHandle submit(const CallOptions& options, std::function<void()> work, Part part) override {
    const DeviceGuard guard(context_.device());
    cudaStream_t comm = context_.comm_stream();
    if (part != Part::kEnd) wait_before(options);
    work();
    if (part == Part::kBegin) return EventHandle();
    if (!options.async_finish) {
      order_.end(native(options.stream), part == Part::kWhole && !options.previous_event);
      return EventHandle(std::make_shared<StreamEnd>(comm, context_.events(), context_.device(),
                                                     context_.faults()));
    }
    auto after = context_.events()->take();
    check(cudaEventRecord(after.get(), comm), "cudaEventRecord");
    return EventHandle(
        std::make_shared<CudaEvent>(std::move(after), context_.device(), context_.faults()));
  }

  void run(const CallOptions& options, std::function<void()> work) override {
    const DeviceGuard guard(context_.device());
    // Kernels of one Buffer never run side by side, and memory comes back behind the communication
    // stream: so what comes here is behind that, and what comes there behind this.
    cudaStream_t caller = native(options.stream);
    order_.order(context_.comm_stream(), caller);
    work();
    order_.order(caller, context_.comm_stream());
  }

  Stream comm_stream() const override { return {context_.comm_stream(), options_.device}; }

  bool queues_steps() const override { return true; }
  void synchronize() override { context_.synchronize(); }

  void raise_fault(const Error& error) noexcept override {
    context_.raise_fault(error);
    internode_.tell_fault();
  }
  std::optional<Error> fault(const char* operation) const override {
    return context_.faults()->error(operation);
  }

  void close() override {
    synchronize();
    internode_.free();
    heap_->close();
    private_heap_->close();
    context_.fabric().close();
  }

  void get_dispatch_layout(const deep_ep::internode::LayoutParams& params) override;
  void barrier(const deep_ep::intranode::BarrierParams& params) override;
  void notify_dispatch(const deep_ep::intranode::NotifyDispatchParams& params) override;
  void await_counts(const deep_ep::intranode::NotifyDispatchParams& params) override;
  void dispatch(const deep_ep::intranode::DispatchParams& params) override;
  void group_rows(const deep_ep::intranode::GroupParams& params) override {
    const Results counts = allocate_results(
        params.known ? 0 : intranode::group_count_bytes(params.shape), comm_stream());
    cuda::group_rows(context_, params, reinterpret_cast<std::int32_t*>(counts.data));
  }
  void reduce_rows(const deep_ep::intranode::ReduceParams& params) override {
    cuda::reduce_rows(context_, params);
  }
  // The record travels with the place of the inbox, in combine's own kernel.
  void cached_notify_combine(const deep_ep::intranode::CombineParams&) override {}
  void combine(const deep_ep::intranode::CombineParams& params) override;
  void dispatch(const deep_ep::internode_ll::DispatchParams& params) override {
    require_aligned(params.x, "x");
    require_aligned(params.recv_x, "recv_x");
    low_latency_.dispatch(params);
  }
  void combine(const deep_ep::internode_ll::CombineParams& params) override {
    require_aligned(params.x, "x");
    require_aligned(params.combined_x, "out");
    low_latency_.combine(params);
  }
  void alloc_symmetric(Bootstrap& bootstrap, std::int64_t bytes) override {
    internode_.alloc(bootstrap, bytes);
  }
  void free_symmetric() noexcept override { internode_.free(); }
  void barrier(const deep_ep::internode::BarrierParams& params) override {
    internode_.barrier(params);
  }
  void notify_dispatch(const deep_ep::internode::NotifyDispatchParams& params) override {
    internode_.notify_dispatch(params);
  }
  void dispatch(const deep_ep::internode::DispatchParams& params) override {
    internode_.dispatch(params);
  }
  void cached_notify(const deep_ep::internode::CombineParams& params) override {
    internode_.cached_notify(params);
  }
  void combine(const deep_ep::internode::CombineParams& params) override {
    internode_.combine(params,
                       allocate_results(internode_.combine_block_bytes(params), comm_stream()));
  }
  void update_mask(int rank, bool masked, Stream stream) override {
    const DeviceGuard guard(context_.device());
    low_latency_.update_mask(rank, masked, stream);
  }
  void query_mask(std::int32_t* masks, Stream stream) override {
    const DeviceGuard guard(context_.device());
    order_.order(context_.comm_stream(), native(stream));
    low_latency_.query_mask(masks, stream);
  }
  void clean_mask(Stream stream) override {
    const DeviceGuard guard(context_.device());
    low_latency_.clean_mask(stream);
  }

 private:
  static std::vector<Tensor> allocate_from(DeviceHeap& heap, std::vector<TensorView> views,
                                           Stream stream) {
    const auto carve = [&](Carver carver) {
      for (TensorView& view : views)
        view.data = carver.take<std::byte>(static_cast<std::int64_t>(view.nbytes()));
      return carver.used();
    };
    const Results results = heap.allocate(carve(Carver(nullptr)), native(stream));
    (void)carve(Carver(results.data));
    std::vector<Tensor> tensors;
    for (const TensorView& view : views) tensors.emplace_back(view, results.owner);
    return tensors;
  }
  void wait_before(const CallOptions& options) {
    if (options.previous_event) {
      options.previous_event->current_stream_wait(comm_stream());
    } else {
      order_.begin(native(options.stream));
    }
  }
  fabric::Heap::NewSegment grow(std::int64_t bytes) {
    const RelaxedCapture relaxed;
    const std::int64_t rounded = (bytes + kGrowthBytes - 1) / kGrowthBytes * kGrowthBytes;
    const int segment = context_.add_segment(rounded);
    log::debug("rank {}: segment {} of {} bytes added for a result of {} bytes", options_.rank,
               segment, rounded, bytes);
    return {segment, context_.fabric().own_segment(segment)->bytes()};
  }

  fabric::Heap::NewSegment grow_private(std::int64_t bytes) {
    const RelaxedCapture relaxed;
    const std::int64_t rounded = (bytes + kGrowthBytes - 1) / kGrowthBytes * kGrowthBytes;
    if (!private_memory_) private_memory_ = make_memory(context_.device());
    private_segments_.push_back(private_memory_->allocate(rounded));
    return {static_cast<int>(private_segments_.size()) - 1, private_segments_.back()->bytes()};
  }

  BackendOptions options_;
  mutable Context context_;
  Internode internode_;
  LowLatency low_latency_;
  StreamOrder order_{context_};
  std::uint64_t counts_ticket_ = 0;  // of the last notify that the host waits for
  std::unique_ptr<fabric::Memory> private_memory_;
  std::vector<std::shared_ptr<fabric::Mapping>> private_segments_;
  std::shared_ptr<DeviceHeap> heap_;
  std::shared_ptr<DeviceHeap> private_heap_;
};

void CudaBackend::get_dispatch_layout(const deep_ep::internode::LayoutParams& params) {
  intranode::LayoutArgs args;
  args.comm = context_.comm({});
  args.topk_idx = ids_of(params.topk_idx);
  args.num_tokens = params.shape.num_tokens;
  args.num_topk = params.shape.num_topk;
  args.num_experts = params.shape.num_experts;
  args.num_ranks = params.shape.num_ranks;
  args.ranks_per_node = options_.topology.ranks_per_node;
  args.sums = context_.sum_words(params.shape.num_ranks + params.shape.num_experts +
                                 options_.topology.num_nodes());
  args.num_tokens_per_node = params.num_tokens_per_rdma_rank;
  args.num_tokens_per_rank = params.num_tokens_per_rank;
  args.num_tokens_per_expert = params.num_tokens_per_expert;
  args.is_token_in_rank = params.is_token_in_rank;
  check(intranode::launch_layout(args, context_.comm_stream()), "launch of layout");
}

void CudaBackend::barrier(const deep_ep::intranode::BarrierParams& params) {
  check(intranode::launch_barrier({context_.comm(params.call)}, context_.comm_stream()),
        "launch of barrier");
  context_.finish(params.call.operation);
}

void CudaBackend::notify_dispatch(const deep_ep::intranode::NotifyDispatchParams& params) {
  const protocol::CallRecord& record = params.call.record;
  require(record.num_experts / options_.num_ranks <= protocol::ControlBlock::kMaxLocalExperts,
          "num_experts is {}, more than {} for each of {} ranks", record.num_experts,
          protocol::ControlBlock::kMaxLocalExperts, options_.num_ranks);
  intranode::NotifyArgs args;
  args.comm = context_.comm(params.call);
  args.num_tokens_per_rank = params.num_tokens_per_rank;
  args.num_tokens_per_expert = params.num_tokens_per_expert;
  args.is_token_in_rank = params.is_token_in_rank;
  args.topk_idx = ids_of(params.topk_idx);
  args.num_channels = params.num_channels;
  args.rank_prefix_matrix = params.rank_prefix_matrix;
  args.channel_prefix_matrix = params.channel_prefix_matrix;
  args.send_head = params.send_head;
  args.counts =
      context_.count_words((record.num_tokens / kTokensPerCount + 1) * options_.num_ranks);
  args.max_rows = params.max_rows;
  if (params.num_recv_rows != nullptr)
    counts_ticket_ = args.ticket = context_.take_ticket(params.call.operation);
  check(intranode::launch_notify(args, sms_of(context_, params.call), context_.comm_stream()),
        "launch of notify");
}

void CudaBackend::await_counts(const deep_ep::intranode::NotifyDispatchParams& params) {
  if (params.num_recv_rows == nullptr) return;
  const DeviceGuard guard(context_.device());
  const HostStatus& status = context_.await_ticket(params.call.operation, counts_ticket_);
  *params.num_recv_rows = status.num_recv_rows;
  if (params.num_tokens_per_expert == nullptr) return;
  std::copy_n(status.tokens_per_expert, params.call.record.num_experts / options_.num_ranks,
              params.recv_tokens_per_expert);
}

void CudaBackend::dispatch(const deep_ep::intranode::DispatchParams& params) {
  intranode::DispatchArgs args;
  set_step(params, args);
  args.comm = context_.comm(params.call);
  args.cached = params.cached;
  args.tentative = params.tentative;
  args.rank_prefix_matrix = params.rank_prefix_matrix;
  args.send_head = params.send_head;
  args.num_channels = params.num_channels;
  args.fills_handle = params.recv_src_idx != nullptr;
  args.handle_segment = params.handle_block.segment;
  args.handle_offset = params.handle_block.offset;
  args.recv_src_idx = params.recv_src_idx;
  check(intranode::launch_dispatch(args, sms_of(context_, params.call), context_.comm_stream()),
        "launch of dispatch");
  copy_outputs(context_, params);
}

void CudaBackend::combine(const deep_ep::intranode::CombineParams& params) {
  require_aligned(params.x, "x");
  for (const std::byte* bias : params.bias) require_aligned(bias, "bias");
  intranode::CombineArgs args;
  args.comm = context_.comm(params.call);
  const protocol::CallRecord& record = params.call.record;
  args.x = params.x;
  args.topk_weights = params.topk_weights;
  args.bias[0] = params.bias[0];
  args.bias[1] = params.bias[1];
  args.format.x_bytes = record.hidden * static_cast<std::int64_t>(size_of(params.dtype));
  args.format.topk_weights_bytes = record.has_topk_weights != 0 ? record.num_topk * 4 : 0;
  args.rank_prefix_matrix = params.rank_prefix_matrix;
  args.send_head = params.send_head;
  args.num_rows = params.num_rows;
  args.inbox_rows = record.num_tokens * (options_.num_ranks - 1);
  const Results inbox =
      allocate_results(plan::RecvArrays::bytes(args.format, args.inbox_rows), comm_stream());
  args.inbox_segment = inbox.block.segment;
  args.inbox_offset = inbox.block.offset;
  args.combined_x = params.combined_x;
  args.combined_topk_weights = params.combined_topk_weights;
  args.wait_stats = params.wait_stats;
  check(intranode::launch_combine(args, sum_type(params.dtype), sms_of(context_, params.call),
                                  context_.comm_stream()),
        "launch of combine");
}

}  // namespace

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  return std::make_unique<CudaBackend>(options);
}

}  // namespace deep_ep::cuda
