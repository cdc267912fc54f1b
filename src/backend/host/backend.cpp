#include "backend/backend.hpp"

#include <algorithm>
#include <thread>

#include "backend/host/comm_stream.hpp"
#include "backend/host/context.hpp"
#include "backend/host/internode/state.hpp"
#include "backend/host/internode/steps.hpp"
#include "backend/host/internode_ll/state.hpp"
#include "backend/host/internode_ll/steps.hpp"
#include "backend/host/intranode/steps.hpp"
#include "backend/host/private_heap.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "plan/layout.hpp"

namespace deep_ep {

namespace {

// Growth in steps of this size wastes little and keeps the number of segments small.
constexpr std::int64_t kGrowthBytes = 8 << 20;
// From here on fresh pages from the system cost more than the work on them; a heap's pages are
// there already.
constexpr std::int64_t kHeapBytes = 256 << 10;

template <class Id>
void fill_layout(const internode::LayoutParams& params) {
  const auto bad = plan::get_dispatch_layout(params.shape, params.topk_idx.as<const Id>(),
                                             params.num_tokens_per_rank,
                                             params.num_tokens_per_expert, params.is_token_in_rank);
  if (!bad) return;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("topk_idx[{}, {}] is {}, allowed are -1 and 0 to {} (num_experts - 1)",
                          bad->token, bad->k, bad->id, params.shape.num_experts - 1));
}

class HostBackend final : public Backend {
 public:
  explicit HostBackend(const BackendOptions& options)
      : options_(options),
        context_(options),
        heap_(std::make_shared<fabric::Heap>([this](std::int64_t bytes) { return grow(bytes); })),
        private_heap_(std::make_shared<host::PrivateHeap>()),
        low_latency_(context_, options),
        internode_(context_, options) {}

  ~HostBackend() override { close(); }

  std::string export_handles() override {
    const std::int64_t control = host::Context::control_bytes(options_.topology);
    const std::int64_t bytes = std::max(options_.heap_bytes, control);
    if (options_.heap_bytes < control && options_.heap_bytes > 0) {
      log::info("num_nvl_bytes raised from {} to {}: the control block and the inbox need that",
                options_.heap_bytes, control);
    }
    const std::int64_t low_latency = several_nodes() ? 0 : options_.low_latency_bytes;
    std::string handles = context_.export_handles(bytes + low_latency);
    const std::int64_t begin = control + low_latency;
    const std::int64_t end = context_.fabric().own_segment(0)->bytes();
    if (end > begin) heap_->add(0, begin, end);
    return handles;
  }

  void open_handles(const std::vector<std::string>& exported) override {
    context_.open_handles(exported, options_.timeout);
    if (!several_nodes()) low_latency_.open();
  }

  std::string findings() override { return context_.why_no_pull(); }
  void agree(const std::vector<std::string>& findings) override { context_.choose_path(findings); }
  std::string transport() const override {
    if (internode_.open()) {
      return fmt::format("{} nodes of {} ranks: shared memory inside, {} between them",
                         options_.topology.num_nodes(), options_.topology.ranks_per_node,
                         options_.one_process ? "memory of the process" : "UCX");
    }
    return fmt::format("shared memory, combine {}",
                       context_.pulls() ? "pulls rows from the peers" : "through the inbox");
  }

  Results allocate_results(std::int64_t bytes, Stream) override {
    Results results;
    results.block = heap_->allocate(bytes);
    const std::shared_ptr<fabric::Mapping> mapping =
        context_.fabric().own_segment(results.block.segment);
    results.data = mapping->base() + results.block.offset;
    results.owner = std::shared_ptr<void>(
        results.data, [heap = heap_, mapping, block = results.block](void*) { heap->free(block); });
    return results;
  }

  Results allocate_mapped(std::int64_t bytes) override { return allocate_results(bytes, {}); }
  fabric::Block locate(const void* memory, std::int64_t bytes) const override {
    const fabric::Fabric::Spot spot = context_.fabric().locate(memory, bytes);
    return {spot.segment, spot.offset, bytes};
  }

  std::vector<Tensor> allocate(std::vector<TensorView> views, Stream stream) override {
    return allocate_private(std::move(views), stream);
  }
  std::vector<Tensor> allocate_private(std::vector<TensorView> views, Stream) override {
    std::vector<Tensor> tensors;
    for (TensorView& view : views) {
      const auto bytes = static_cast<std::int64_t>(view.nbytes());
      const std::shared_ptr<void> owner = bytes < kHeapBytes
                                              ? Tensor::empty(DType::kUint8, {bytes}).owner()
                                              : private_heap_->allocate(bytes);
      view.data = owner.get();
      tensors.emplace_back(view, owner);
    }
    return tensors;
  }

  void reserve(std::int64_t bytes) override { heap_->reserve(bytes); }
  int num_segments() const override { return context_.fabric().num_own_segments(); }

  void wait_mapped(const std::vector<int>& num_segments) override {
    wait_segments("reserve", num_segments);
  }

  std::int64_t mapped_bytes() const override { return context_.fabric().own_bytes(); }
  std::int64_t live_bytes() const override { return heap_->live_bytes(); }

  Tensor heap() const override {
    std::shared_ptr<fabric::Mapping> mapping = context_.fabric().own_segment(0);
    const std::int64_t begin =
        words_bytes(options_, host::Context::control_bytes(options_.topology));
    return {TensorView(mapping->base() + begin, DType::kUint8, {mapping->bytes() - begin}),
            mapping};
  }

  EventHandle submit(const CallOptions& options, std::function<void()> work, Part) override {
    if (options.async_finish) return stream_.enqueue(std::move(work));
    stream_.drain();
    work();
    return EventHandle();
  }
  void await(const CallOptions& options) override {
    if (options.previous_event) options.previous_event->host_wait();
  }

  void run(const CallOptions&, std::function<void()> work) override {
    stream_.drain();
    work();
  }

  Stream comm_stream() const override { return {}; }
  void synchronize() override { stream_.drain(); }

  void raise_fault(const Error& error) noexcept override { context_.raise_fault(error); }
  std::optional<Error> fault(const char* operation) const override {
    return context_.fault(operation);
  }

  void close() override {
    stream_.drain();
    internode_.free();
    context_.fabric().close();
  }

  void get_dispatch_layout(const internode::LayoutParams& params) override {
    if (params.topk_idx.dtype == DType::kInt64) {
      fill_layout<std::int64_t>(params);
    } else {
      fill_layout<std::int32_t>(params);
    }
    if (params.num_tokens_per_rdma_rank == nullptr) return;
    plan::count_tokens_per_node(params.is_token_in_rank, params.shape.num_tokens, params.topology,
                                params.num_tokens_per_rdma_rank);
  }

  void barrier(const intranode::BarrierParams& params) override {
    context_.post(params.call);
    context_.wait_posted(params.call);
  }
  void notify_dispatch(const intranode::NotifyDispatchParams& params) override {
    host::intranode::notify_dispatch(context_, params);
  }
  void dispatch(const intranode::DispatchParams& params) override {
    host::intranode::dispatch(context_, params.cached ? hashed(params) : params);
  }
  void group_rows(const intranode::GroupParams& params) override {
    host::intranode::group_rows(context_, params);
  }
  void reduce_rows(const intranode::ReduceParams& params) override {
    host::intranode::reduce_rows(context_, params);
  }
  void cached_notify_combine(const intranode::CombineParams& params) override {
    host::intranode::cached_notify_combine(context_, hashed(params));
  }
  void combine(const intranode::CombineParams& params) override {
    host::intranode::combine(context_, hashed(params));
  }
  void dispatch(const internode_ll::DispatchParams& params) override {
    host::internode_ll::dispatch(low_latency_, params);
  }
  void combine(const internode_ll::CombineParams& params) override {
    host::internode_ll::combine(low_latency_, params);
  }
  void alloc_symmetric(Bootstrap& bootstrap, std::int64_t bytes) override {
    internode_.alloc(bootstrap, bytes, options_);
    if (options_.low_latency_bytes == 0) return;
    wait_segments("Buffer::Buffer", std::vector<int>(options_.num_ranks, num_segments()));
    low_latency_.open(internode_);
  }
  void free_symmetric() noexcept override { internode_.free(); }
  void barrier(const internode::BarrierParams& params) override {
    host::internode::barrier(internode_, params);
  }
  void notify_dispatch(const internode::NotifyDispatchParams& params) override {
    host::internode::notify_dispatch(internode_, params);
  }
  void dispatch(const internode::DispatchParams& params) override {
    host::internode::dispatch(internode_, params);
  }
  void cached_notify(const internode::CombineParams& params) override {
    host::internode::cached_notify(internode_, params);
  }
  void combine(const internode::CombineParams& params) override {
    host::internode::combine(internode_, params);
  }
  NetworkCounts network_counts() const override { return internode_.counts(); }
  void update_mask(int rank, bool masked, Stream) override {
    stream_.drain();
    low_latency_.mask(rank, masked);
  }
  void query_mask(std::int32_t* masks, Stream) override {
    stream_.drain();
    for (int i = 0; i < options_.num_ranks; ++i) masks[i] = low_latency_.masked(i) ? 1 : 0;
  }
  void clean_mask(Stream) override {
    stream_.drain();
    for (int i = 0; i < options_.num_ranks; ++i) low_latency_.mask(i, false);
  }

 private:
  bool several_nodes() const { return options_.topology.num_nodes() > 1; }

  void wait_segments(const char* operation, const std::vector<int>& num_segments) {
    const Call call{.operation = operation, .timeout = options_.timeout};
    for (int i = 0; i < context_.num_ranks(); ++i) {
      const int rank = context_.global_rank(i);
      const int last = num_segments[rank] - 1;
      context_.wait(
          call, "its memory to be mapped",
          [&] { return context_.segment_base(call, i, last) != nullptr; },
          [&] {
            return std::vector<host::Missing>{{rank, std::uint64_t(last) + 1, 0}};
          });
    }
  }

  /// With the hash of the handle's routing in the record, for the ranks to compare.
  template <class Params>
  Params hashed(Params params) const {
    // FNV-1a over the elements.
    std::uint64_t hash = 0xcbf29ce484222325;
    for (int i = 0; i < options_.num_ranks * options_.num_ranks; ++i) {
      hash = (hash ^ static_cast<std::uint32_t>(params.rank_prefix_matrix[i])) * 0x100000001b3;
    }
    params.call.record.routing_hash = hash;
    return params;
  }

  fabric::Heap::NewSegment grow(std::int64_t bytes) {
    const std::int64_t rounded = (bytes + kGrowthBytes - 1) / kGrowthBytes * kGrowthBytes;
    const int segment = context_.fabric().add_segment(rounded);
    log::debug("rank {}: segment {} of {} bytes added for a result of {} bytes", options_.rank,
               segment, rounded, bytes);
    return {segment, context_.fabric().own_segment(segment)->bytes()};
  }

  BackendOptions options_;
  mutable host::Context context_;
  std::shared_ptr<fabric::Heap> heap_;
  std::shared_ptr<host::PrivateHeap> private_heap_;
  host::internode_ll::State low_latency_;
  host::internode::State internode_;
  host::CommStream stream_;
};

}  // namespace

std::unique_ptr<Backend> make_host_backend(const BackendOptions& options) {
  return std::make_unique<HostBackend>(options);
}

}  // namespace deep_ep
