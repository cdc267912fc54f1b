#include "deep_ep/buffer.hpp"

#include <unistd.h>

#include <fstream>
#include <thread>
#include <vector>

#include "api/buffer_impl.hpp"
#include "api/validate.hpp"
#include "backend/plugin.hpp"
#include "base/env.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "base/trace.hpp"
#include "modes/internode.hpp"
#include "modes/intranode.hpp"

namespace deep_ep {

namespace {

std::chrono::milliseconds choose_timeout(std::chrono::milliseconds given) {
  env::require_timeout(given, 0);
  return given.count() > 0 ? given : std::chrono::milliseconds(env::timeout_ms());
}

}  // namespace

Buffer::Impl::Impl(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options)
    : bootstrap_(std::move(bootstrap)), options_(options) {
  require(bootstrap_ != nullptr, "bootstrap is null");
}

std::string Buffer::Impl::allocate_and_export() {
  validate(options_, bootstrap_->rank(), bootstrap_->size());
  options_.timeout = choose_timeout(options_.timeout);
  trace::step("allocate");
  backend_ = make_backend(
      {.device = options_.device,
       .heap_bytes = options_.num_nvl_bytes,
       .low_latency_bytes = has_low_latency() ? (options_.num_rdma_bytes + 127) / 128 * 128 : 0,
       .enable_shrink = options_.enable_shrink,
       .timeout = options_.timeout,
       .num_threads = options_.num_threads,
       .rank = bootstrap_->rank(),
       .num_ranks = bootstrap_->size(),
       .topology = topology_,
       .ranks_on_host = ranks_on_host_,
       .one_process = one_process_});
  trace::step("export_handles");
  return backend_->export_handles();
}

void Buffer::Impl::find_nodes(const std::vector<std::string>& ids) {
  std::vector<std::string> hosts, gpus;
  const auto own = internode::UniqueId::decode(ids[bootstrap_->rank()]);
  ranks_on_host_ = 0;
  one_process_ = true;
  for (const std::string& text : ids) {
    const auto id = internode::UniqueId::decode(text);
    hosts.push_back(id.host);
    gpus.push_back(id.gpus);
    ranks_on_host_ += id.host == own.host ? 1 : 0;
    one_process_ = one_process_ && id.process == own.process;
  }
  topology_ = plan::find_topology(plan::split_hosts(hosts, gpus), env::ranks_per_node());
}

void Buffer::Impl::require_one_node(const char* operation) const {
  if (topology_.num_nodes() == 1) return;
  throw Error(
      ErrorCode::kUnsupported,
      fmt::format("{}: the {} ranks are of {} nodes of {}, this call is for ranks of one "
                  "node",
                  operation, topology_.num_ranks, topology_.num_nodes(), topology_.ranks_per_node));
}

void Buffer::Impl::sync() {
  const auto exchange = [this](const std::function<std::string()>& step,
                               const char* agreed = nullptr) {
    return this->exchange("constructing the Buffer", step, agreed);
  };
  (void)exchange([this] { return std::to_string(options_.num_rdma_bytes); }, "num_rdma_bytes");
  (void)exchange([] { return std::to_string(env::ranks_per_node()); }, "DEEP_EP_RANKS_PER_NODE");
  find_nodes(exchange([this] {
    internode::UniqueId id = internode::get_unique_id();
    if (options_.device.type == DeviceType::kCuda)
      id.gpus = cuda_parts().reach(options_.device.index);
    return id.encode();
  }));
  if (topology_.num_nodes() > 1)
    (void)exchange([this] { return std::to_string(options_.low_latency_mode ? 1 : 0); },
                   "low_latency_mode");
  const std::vector<std::string> handles = exchange([this] { return allocate_and_export(); });
  trace::step("Buffer::sync");
  trace::step("open_handles");
  backend_->agree(exchange([&] {
    backend_->open_handles(handles);
    return backend_->findings();
  }));
  internode::init(*backend_);
  if (topology_.num_nodes() > 1) internode::alloc(*backend_, *bootstrap_, options_.num_rdma_bytes);
}

Buffer::Impl::~Impl() { destroy(); }

/// Takes the turn of calls. One that runs on another thread would go on in memory that is gone: it
/// is ended by a fault first.
void Buffer::Impl::end_calls() {
  for (bool told = false; in_call_.exchange(true, std::memory_order_acquire);
       std::this_thread::sleep_for(std::chrono::microseconds(100))) {
    if (std::exchange(told, true)) continue;
    fail({ErrorCode::kPeerFailed,
          fmt::format("destroy on rank {}: the Buffer is destroyed while a call on it runs",
                      bootstrap_->rank()),
          {bootstrap_->rank()}});
  }
}

void Buffer::Impl::destroy() {
  if (getpid() != pid_) {
    // A fork's copy: its threads are not here, what is mapped is the parent's.
    static auto* const inherited = new std::vector<std::unique_ptr<Backend>>;
    inherited->push_back(std::move(backend_));
    return;
  }
  const std::lock_guard lock(destroy_mutex_);
  if (!backend_) return;
  end_calls();
  *self_ = nullptr;
  trace::step("synchronize");
  backend_->synchronize();
  if (topology_.num_nodes() > 1) internode::free(*backend_);
  trace::step("release");
  backend_->close();
  internode::finalize(*backend_);
  backend_.reset();
  in_call_.store(false, std::memory_order_release);
}

Buffer::Impl::Usage::Usage(Impl& impl, const char* operation) : impl_(impl) {
  if (impl.in_call_.exchange(true, std::memory_order_acquire)) {
    throw Error(ErrorCode::kUsage,
                fmt::format("{}: another call on this Buffer has not returned; calls on one Buffer "
                            "come one at a time",
                            operation));
  }
  if (!impl.backend_) {
    impl.in_call_.store(false, std::memory_order_release);
    throw Error(ErrorCode::kUsage, fmt::format("{}: the Buffer is destroyed", operation));
  }
}

std::function<void()> Buffer::Impl::stage(std::uint64_t number, bool last,
                                          const CallOptions& options, std::function<void()> body) {
  return [this, operation = log_.name(number), number, last, options, body = std::move(body)] {
    fail_together(operation, [&] {
      try {
        backend_->await(options);
        check_fault(operation);
        body();
        if (last) log_.finish(number, "done");
      } catch (...) {
        log_.finish(number, "failed");  // before the dump of a fault
        throw;
      }
    });
  };
}

Error Buffer::Impl::no_memory(const char* operation) {
  return {ErrorCode::kOutOfMemory,
          fmt::format("{}: the allocator has no memory for this rank's bookkeeping", operation)};
}

Error Buffer::Impl::failed(const char* operation, const char* what) const {
  return {ErrorCode::kSystem,
          fmt::format("{} on rank {}: {}", operation, bootstrap_->rank(), what)};
}

void Buffer::Impl::check_fault(const char* operation) const {
  {
    const std::lock_guard lock(first_error_mutex_);
    if (first_error_) throw Error(*first_error_);
  }
  if (std::optional<Error> known = backend_->fault(operation)) throw Error(*known);
}

void Buffer::Impl::check() const {
  if (backend_) check_fault("check");
}

void Buffer::Impl::fail(const Error& error) noexcept {
  if (error.code() == ErrorCode::kUsage) return;
  {
    const std::lock_guard lock(first_error_mutex_);
    if (!first_error_) first_error_ = error;
  }
  backend_->raise_fault(error);
  try {
    const std::string directory = env::dump_directory();
    if (directory.empty() || dumped_.exchange(true)) return;
    std::ofstream(fmt::format("{}/deep_ep_rank{}_{}.json", directory, bootstrap_->rank(), getpid()))
        << log_.to_json() << '\n';
  } catch (const std::exception& failure) {
    log::warn("no dump of the last operations: {}", failure.what());
  }
}

Call Buffer::Impl::make_call(const char* operation, const Config& config) const {
  Call call;
  call.operation = operation;
  call.epoch = epoch_;
  call.timeout = options_.timeout;
  call.num_threads = config.num_sms;
  call.record.x_dtype = call.record.scale_dtype = call.record.topk_dtype = -1;
  return call;
}

void Buffer::Impl::barrier() {
  collective("barrier", [this] {
    Call call = make_call("barrier", {});
    call.record.kind = protocol::OpKind::kBarrier;
    const std::uint64_t number = log_.begin("barrier", epoch_, call.record);
    backend_->submit({}, stage(number, true, {}, [&] {
                       if (topology_.num_nodes() > 1) {
                         internode::barrier(*backend_, {call});
                       } else {
                         intranode::barrier(*backend_, {call});
                       }
                     }));
  });
}

internode::LayoutParams Buffer::Impl::allocate_layout(const TensorView& topk_idx, int num_experts,
                                                      const CallOptions& options,
                                                      DispatchLayout& layout) {
  const int num_ranks = bootstrap_->size();
  internode::LayoutParams params;
  params.shape = validate_topk_idx(topk_idx, num_experts, num_ranks, options_.device);
  params.topk_idx = topk_idx;
  std::vector<TensorView> views{
      {nullptr, DType::kInt32, {num_ranks}, options_.device},
      {nullptr, DType::kInt32, {num_experts}, options_.device},
      {nullptr, DType::kBool, {params.shape.num_tokens, num_ranks}, options_.device}};
  if (topology_.num_nodes() > 1)
    views.emplace_back(nullptr, DType::kInt32,
                       std::initializer_list<std::int64_t>{topology_.num_nodes()}, options_.device);
  const std::vector<Tensor> made = allocate(std::move(views), options);
  layout.num_tokens_per_rank = made[0];
  layout.num_tokens_per_expert = made[1];
  layout.is_token_in_rank = made[2];
  params.num_tokens_per_rank = layout.num_tokens_per_rank.as<std::int32_t>();
  params.num_tokens_per_expert = layout.num_tokens_per_expert.as<std::int32_t>();
  params.is_token_in_rank = layout.is_token_in_rank.as<bool>();
  params.topology = topology_;
  if (topology_.num_nodes() > 1) {
    layout.num_tokens_per_rdma_rank = made[3];
    params.num_tokens_per_rdma_rank = layout.num_tokens_per_rdma_rank.as<std::int32_t>();
  }
  return params;
}

DispatchLayout Buffer::Impl::get_dispatch_layout(const TensorView& topk_idx, int num_experts,
                                                 const CallOptions& options) {
  const Usage usage(*this, "get_dispatch_layout");
  const NvtxRange range("get_dispatch_layout");
  check_fault("get_dispatch_layout");
  validate(options);
  DispatchLayout layout;
  const internode::LayoutParams params = allocate_layout(topk_idx, num_experts, options, layout);
  layout.event = backend_->submit(options, [this, options, params, keep = layout] {
    backend_->await(options);
    internode::get_dispatch_layout(*backend_, params);
  });
  return layout;
}

Buffer::Buffer(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options) {
  trace::step("Buffer::Buffer");
  impl_ = std::make_unique<Impl>(std::move(bootstrap), options);
  impl_->sync();
}

Buffer::~Buffer() {
  trace::step("Buffer::~Buffer");
  impl_->destroy();
}

// The constructor has done it.
void Buffer::sync() {}
void Buffer::destroy() { impl_->destroy(); }
bool Buffer::is_available() const { return impl_->backend_ != nullptr; }

DispatchLayout Buffer::get_dispatch_layout(const TensorView& topk_idx, int num_experts,
                                           const CallOptions& options) {
  return impl_->get_dispatch_layout(topk_idx, num_experts, options);
}

DispatchResult Buffer::dispatch(const DispatchArgs& args) {
  return num_nodes() > 1 ? internode_dispatch(args) : intranode_dispatch(args);
}
CombineResult Buffer::combine(const CombineArgs& args) {
  return num_nodes() > 1 ? internode_combine(args) : intranode_combine(args);
}

PreparedDispatch Buffer::prepare_dispatch(const DispatchArgs& args) {
  trace::step("Buffer::prepare_dispatch");
  return impl_->prepare_dispatch(args);
}
DispatchResult Buffer::intranode_dispatch(const DispatchArgs& args) {
  trace::step("Buffer::intranode_dispatch");
  return impl_->intranode_dispatch(args);
}
CombineResult Buffer::intranode_combine(const CombineArgs& args) {
  trace::step("Buffer::intranode_combine");
  return impl_->intranode_combine(args);
}

DispatchResult Buffer::internode_dispatch(const DispatchArgs& args) {
  trace::step("Buffer::internode_dispatch");
  return impl_->internode_dispatch(args);
}
CombineResult Buffer::internode_combine(const CombineArgs& args) {
  trace::step("Buffer::internode_combine");
  return impl_->internode_combine(args);
}

void Buffer::barrier() { impl_->barrier(); }
void Buffer::reserve(std::int64_t bytes) { impl_->reserve(bytes); }
void Buffer::check() const { impl_->check(); }
int Buffer::rank() const { return impl_->bootstrap_->rank(); }
int Buffer::num_ranks() const { return impl_->bootstrap_->size(); }
Device Buffer::device() const { return impl_->options_.device; }
std::chrono::milliseconds Buffer::timeout() const { return impl_->options_.timeout; }
void Buffer::set_timeout(std::chrono::milliseconds timeout) {
  impl_->options_.timeout = choose_timeout(timeout);
}

Stream Buffer::comm_stream() const {
  return impl_->backend_ ? impl_->backend_->comm_stream() : Stream{};
}

std::int64_t Buffer::mapped_bytes() const {
  return impl_->backend_ ? impl_->backend_->mapped_bytes() : 0;
}
std::int64_t Buffer::live_bytes() const {
  return impl_->backend_ ? impl_->backend_->live_bytes() : 0;
}

Tensor Buffer::allocate_mapped(std::int64_t bytes) { return impl_->allocate_mapped(bytes); }

Tensor Buffer::get_local_buffer_tensor(DType dtype, std::int64_t offset) const {
  if (!impl_->backend_) {
    throw Error(ErrorCode::kUsage, "get_local_buffer_tensor: the Buffer is destroyed");
  }
  const Tensor heap = impl_->backend_->heap();
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  require(offset >= 0 && offset <= heap.shape[0] && offset % size == 0,
          "offset is {}, must be a multiple of {} in [0, {}]", offset, size, heap.shape[0]);
  return {TensorView(heap.as<std::byte>() + offset, dtype, {(heap.shape[0] - offset) / size},
                     heap.device),
          heap.owner()};
}

int Buffer::num_nodes() const { return impl_->topology_.num_nodes(); }
int Buffer::num_ranks_per_node() const { return impl_->topology_.ranks_per_node; }
NetworkCounts Buffer::network_counts() const {
  return impl_->backend_ ? impl_->backend_->network_counts() : NetworkCounts{};
}

std::string Buffer::transport() const {
  return impl_->backend_ ? impl_->backend_->transport() : "";
}

std::string Buffer::operations_json() const { return impl_->log_.to_json(); }

}  // namespace deep_ep
