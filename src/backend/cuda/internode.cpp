#include "backend/cuda/internode.hpp"

#include <algorithm>

#include "backend/cuda/check.hpp"
#include "backend/cuda/groups.hpp"
#include "base/env.hpp"
#include "base/log.hpp"
#include "base/plugin.hpp"
#include "fabric/agree.hpp"

namespace deep_ep::cuda {

nvshmem::NvshmemParts& nvshmem_parts() {
  using GetParts = nvshmem::NvshmemParts* (*)();
  static nvshmem::NvshmemParts& parts = *reinterpret_cast<GetParts>(load_plugin(
      {.file = "libdeep_ep_nvshmem.so",
       .symbol = "deep_ep_nvshmem",
       .wanted = "device cuda over several nodes",
       .remedy =
           "build with NVSHMEM (pip install nvidia-nvshmem-cu13, or set NVSHMEM_HOME) and let "
           "LD_LIBRARY_PATH name the folder of libnvshmem_host.so.3, or use the host "
           "device"}))();
  return parts;
}

namespace {

internode::RoutingArrays arrays_of(const deep_ep::internode::Routing& routing) {
  internode::RoutingArrays arrays;
  arrays.num_channels = routing.num_channels;
  arrays.is_token_in_rank = routing.is_token_in_rank;
  arrays.rdma_channel_prefix_matrix = routing.rdma_channel_prefix_matrix;
  arrays.gbl_channel_prefix_matrix = routing.gbl_channel_prefix_matrix;
  arrays.recv_rdma_channel_prefix_matrix = routing.recv_rdma_channel_prefix_matrix;
  arrays.recv_rdma_rank_prefix_sum = routing.recv_rdma_rank_prefix_sum;
  arrays.recv_gbl_channel_prefix_matrix = routing.recv_gbl_channel_prefix_matrix;
  arrays.recv_gbl_rank_prefix_sum = routing.recv_gbl_rank_prefix_sum;
  arrays.recv_src_meta = routing.recv_src_meta;
  arrays.send_rdma_head = routing.send_rdma_head;
  arrays.send_nvl_head = routing.send_nvl_head;
  arrays.nvl_head_rows = routing.nvl_head_rows;
  return arrays;
}

/// Lanes that fit into `bytes` bytes.
internode::RailShape fit(internode::RailShape shape, std::int64_t bytes) {
  for (shape.num_lanes = internode::RailShape::kMostLanes; shape.num_lanes > shape.fewest_lanes();
       --shape.num_lanes)
    if (internode::RailBlock::bytes(shape) <= bytes) break;
  return shape;
}

internode::ItemShape make_item(std::int64_t head_bytes, std::int64_t x_bytes,
                               std::int64_t most_part) {
  const internode::ItemShape item = internode::ItemShape::make(head_bytes, x_bytes, most_part);
  if (item.pieces > 0) return item;
  throw Error(ErrorCode::kUnsupported,
              fmt::format("topk and scales of a token are {} bytes between nodes, GPUs take {} "
                          "at most",
                          head_bytes, internode::ItemShape::kMostHead));
}

}  // namespace

Internode::Internode(Context& context, const BackendOptions& options) : context_(context) {
  shape_.topology = options.topology;
  low_latency_bytes_ = options.low_latency_bytes;
}

void Internode::alloc(Bootstrap& bootstrap, std::int64_t bytes) {
  fabric::together(bootstrap, [&] { parts_ = &nvshmem_parts(); });
  shape_ = fit(shape_, bytes);
  const std::int64_t needed = internode::RailBlock::bytes(shape_);
  if (bytes < needed && bootstrap.rank() == 0)
    log::info("num_rdma_bytes raised from {} to {}: rings between {} nodes of {} ranks need that",
              bytes, needed, shape_.topology.num_nodes(), shape_.topology.ranks_per_node);
  fabric::together(bootstrap, [&] {
    const DeviceGuard guard(context_.device());
    state_base_ = static_cast<std::byte*>(state_.get(internode::RailState::bytes(shape_)));
  });
  const std::int64_t low_latency =
      low_latency_bytes_ > 0
          ? internode_ll::NodesLayout::bytes(low_latency_bytes_, shape_.topology.num_ranks)
          : 0;
  auto heap = parts_->allocate(bootstrap, context_.device(), needed + low_latency);
  fabric::together(bootstrap, [&] {
    const DeviceGuard guard(context_.device());
    // Loading a kernel later could wait for those that run, which may wait for it.
    check(parts_->load_kernels(), "loading of the kernels");
  });
  heap_ = std::move(heap);  // from here on kernels may be launched
  if (low_latency_bytes_ > 0) {
    Carver carver(heap_->base() + needed);
    low_latency_ =
        internode_ll::NodesLayout::carve(carver, low_latency_bytes_, shape_.topology.num_ranks);
  }
  find_mapped(bootstrap);
  log::debug("rank {}: {} lanes to each of {} other nodes", context_.global_rank(),
             shape_.num_lanes, shape_.num_peers());
}

/// Both ranks of a pair write, or both put: where a message is read follows from that.
void Internode::find_mapped(Bootstrap& bootstrap) {
  const plan::Topology& topology = shape_.topology;
  const int self = context_.global_rank();
  const bool puts_only = env::nvshmem_puts_only();
  std::string mine;
  for (int rank = 0; rank < topology.num_ranks; ++rank) {
    const bool near = topology.node_of(rank) == topology.node_of(self) || !puts_only;
    mapped_.push_back(near ? heap_->mapped(rank) : nullptr);
    mine += mapped_.back() != nullptr ? '1' : '0';
  }
  const std::vector<std::string> all = bootstrap.all_gather(mine);
  for (int rank = 0; rank < topology.num_ranks; ++rank)
    if (all[rank][self] != '1') mapped_[rank] = nullptr;
  const internode::Rails own = rails({});
  std::vector<std::byte*> peers;
  for (int peer = 0; peer < shape_.num_peers(); ++peer)
    peers.push_back(mapped_[own.rank_of_peer(peer)]);
  fabric::together(bootstrap, [&] {
    const DeviceGuard guard(context_.device());
    check(cudaMemcpyAsync(own.state.mapped, peers.data(), peers.size() * sizeof peers[0],
                          cudaMemcpyHostToDevice, context_.comm_stream()),
          "copy of addresses");
    context_.synchronize();
  });
}

Comm Internode::comm_of_all(const Call& call) const {
  const plan::Topology& topology = shape_.topology;
  if (topology.num_ranks > kMaxRanks)
    throw Error(ErrorCode::kUnsupported,
                fmt::format("{}: {} ranks; low latency of GPUs has {} at most", call.operation,
                            topology.num_ranks, kMaxRanks));
  Comm comm = context_.comm(call);
  const std::ptrdiff_t begin = low_latency_.near_base - heap_->base();
  comm.rank = context_.global_rank();
  comm.num_ranks = topology.num_ranks;
  comm.first_rank = 0;
  for (int rank = 0; rank < topology.num_ranks; ++rank)
    comm.bases[rank] = mapped_[rank] == nullptr ? nullptr : mapped_[rank] + begin;
  return comm;
}

internode_ll::Nodes Internode::nodes(const Call& call, const internode_ll::StepArgs& step) const {
  internode_ll::Nodes nodes;
  nodes.node = step;
  nodes.node.comm = comm(call);
  nodes.rails = rails(call);
  nodes.far = low_latency_.far;
  nodes.shape = internode_ll::FarShape(step.places);
  return nodes;
}

void Internode::free() noexcept {
  if (heap_ == nullptr) return;
  tell(true);
  context_.synchronize();
  if (protocol::load_acquire(&context_.faults()->status().faulted) != 0) heap_->abandon();
  heap_.reset();
}

NetworkCounts Internode::counts() const {
  internode::SentCounts sent{};
  if (!open()) return {};
  const DeviceGuard guard(context_.device());
  const void* from = rails({}).state.sent_counts;
  check(cudaMemcpyAsync(&sent, from, sizeof sent, cudaMemcpyDefault, context_.comm_stream()),
        "copy of counts");
  context_.synchronize();
  const auto n = [](std::uint64_t count) { return static_cast<std::int64_t>(count); };
  return {n(sent.rows), n(sent.row_bytes), n(sent.puts), n(sent.put_bytes), n(sent.signals)};
}

internode::Rails Internode::rails(const Call& call) const {
  internode::Rails rails;
  rails.lanes = shape_.lanes_of_call(std::max(1, sms_of(context_, call)));
  rails.timeout_ns = std::chrono::nanoseconds(call.timeout).count();
  rails.shape = shape_;
  rails.node = shape_.topology.node_of(context_.global_rank());
  rails.index = shape_.topology.index_of(context_.global_rank());
  Carver heap(heap_->base());
  rails.block = internode::RailBlock::carve(heap, shape_);
  Carver state(state_base_);
  rails.state = internode::RailState::carve(state, shape_);
  return rails;
}

// A rank of this node may be late because one of another is: who waits for that one is to say so.
Comm Internode::comm(const Call& call) const {
  Comm comm = context_.comm(call);
  comm.timeout_ns += comm.timeout_ns / 8;
  return comm;
}

internode::Workspace Internode::workspace(std::int64_t tokens) {
  Carver carver(work_.get(internode::Workspace::bytes(tokens, shape_.topology)));
  return internode::Workspace::carve(carver, tokens, shape_.topology);
}

internode::NotifyArgs Internode::notify_args(const Call& call) {
  internode::NotifyArgs args;
  args.comm = comm(call);
  args.rails = rails(call);
  args.work = workspace(call.record.num_tokens);
  args.counts = context_.count_words((call.record.num_tokens / kTokensPerCount + 1) *
                                     (shape_.topology.num_ranks + shape_.topology.num_nodes()));
  return args;
}

void Internode::launch_notify(const internode::NotifyArgs& args, const Call& call) {
  check(parts_->launch(args, sms_of(context_, call), context_.comm_stream()), "launch of notify");
}

void Internode::barrier(const deep_ep::internode::BarrierParams& params) {
  launch_notify(notify_args(params.call), params.call);
  context_.finish(params.call.operation);
}

void Internode::notify_dispatch(const deep_ep::internode::NotifyDispatchParams& params) {
  const protocol::CallRecord& record = params.call.record;
  const int local_experts = record.num_experts / shape_.topology.num_ranks;
  require(local_experts <= protocol::ControlBlock::kMaxLocalExperts,
          "num_experts is {}, more than {} for each of {} ranks", record.num_experts,
          protocol::ControlBlock::kMaxLocalExperts, shape_.topology.num_ranks);
  internode::NotifyArgs args = notify_args(params.call);
  args.num_tokens_per_rank = params.num_tokens_per_rank;
  args.num_tokens_per_expert = params.num_tokens_per_expert;
  args.topk_idx = ids_of(params.topk_idx);
  args.routing = arrays_of(params.routing);
  args.max_rows = params.max_rows;
  args.wait_stats = params.wait_stats;
  const bool counted = params.num_recv_rows != nullptr;
  if (counted) args.ticket = context_.take_ticket(params.call.operation);
  launch_notify(args, params.call);
  if (!counted) return;
  const HostStatus& status = context_.await_ticket(params.call.operation, args.ticket);
  *params.num_recv_rows = status.num_recv_rows;
  *params.num_recv_records = status.num_recv_records;
  if (params.num_tokens_per_expert == nullptr) return;
  std::copy_n(status.tokens_per_expert, local_experts, params.recv_tokens_per_expert);
}

void Internode::notify_cached(const Call& call, const KnownRouting& known) {
  internode::NotifyArgs args = notify_args(call);
  args.cached = true;
  args.topk_idx = known.topk_idx;
  args.routing = arrays_of(known.routing);
  args.handle_rows = known.rows;
  args.wait_stats = known.wait_stats;
  args.go = ++go_;
  args.go_at_once = call.record.kind == protocol::OpKind::kCombine;
  launch_notify(args, call);
}

void Internode::dispatch(const deep_ep::internode::DispatchParams& params) {
  internode::DispatchArgs args;
  set_step(params, args);
  args.record_format = plan::RecordFormat(params.format, shape_.topology.ranks_per_node);
  args.item = make_item(args.record_format.x, params.format.x_bytes, internode::kMostPart);
  if (params.cached) {
    // The ids of a prepared dispatch come with it, those of a handle's rows do not.
    const Ids ids = params.fill_handle ? ids_of(params.source.topk_idx) : Ids{};
    notify_cached(params.call, {params.routing, params.block_rows, ids, params.wait_stats});
    args.go = go_;
  }
  args.comm = comm(params.call);
  args.rails = rails(params.call);
  args.fill_handle = params.fill_handle;
  args.routing = arrays_of(params.routing);
  args.work = workspace(params.call.record.num_tokens);
  if (params.fill_handle) {
    args.work.arrived_tokens = static_cast<std::int32_t*>(
        arrived_.get(4 * std::max<std::int64_t>(params.routing.nvl_head_rows, 1)));
  }
  check(parts_->launch(args, sms_of(context_, params.call), context_.comm_stream()),
        "launch of dispatch");
  if (params.fill_handle) fill_handle(params, args);
  copy_outputs(context_, params);
}

void Internode::fill_handle(const deep_ep::internode::DispatchParams& params,
                            const internode::DispatchArgs& args) {
  internode::HandleArgs handle;
  handle.comm = args.comm;
  handle.rails = args.rails;
  handle.routing = args.routing;
  handle.arrived_tokens = args.work.arrived_tokens;
  handle.rows = params.block_rows;
  const auto base = [&](const fabric::Block& block) {
    return block.segment < 0 ? nullptr
                             : context_.fabric().own_segment(block.segment)->base() + block.offset;
  };
  Carver carver(base(params.block));
  handle.metas = reinterpret_cast<const plan::SourceMeta*>(
      plan::RecvArrays::carve(carver, params.format, params.block_rows, base(params.x_block))
          .src_meta);
  check(parts_->launch(handle, context_.comm_stream()), "launch of fill_handle");
}

void Internode::cached_notify(const deep_ep::internode::CombineParams& params) {
  notify_cached(params.call, {params.routing, params.handle_rows, Ids{}, params.wait_stats});
}

plan::RowFormat Internode::combine_format(const deep_ep::internode::CombineParams& params) {
  const protocol::CallRecord& record = params.call.record;
  plan::RowFormat format;
  format.x_bytes = record.hidden * static_cast<std::int64_t>(size_of(params.dtype));
  format.topk_weights_bytes = record.has_topk_weights != 0 ? record.num_topk * 4 : 0;
  return format;
}

std::int64_t Internode::combine_rows(const deep_ep::internode::CombineParams& params) {
  return std::min(params.num_rows, params.handle_rows);
}

std::int64_t Internode::combine_block_bytes(const deep_ep::internode::CombineParams& params) const {
  // A rank that has its node for itself reads its rows where the caller has them.
  if (shape_.topology.ranks_per_node == 1) return Carver::kAlignment;
  return plan::RecvArrays::bytes(combine_format(params), combine_rows(params));
}

void Internode::offer_rows(const deep_ep::internode::CombineParams& params,
                           const Backend::Results& block, internode::CombineArgs& args) const {
  args.block_segment = block.block.segment;
  args.block_offset = block.block.offset;
  args.block_rows = combine_rows(params);
  if (shape_.topology.ranks_per_node == 1) {
    args.x = params.x;
    args.topk_weights = params.topk_weights;
    return;
  }
  const std::int64_t x_bytes = args.block_rows * args.format.x_bytes;
  const fabric::Fabric::Spot spot = context_.fabric().locate(params.x, x_bytes);
  args.x_segment = spot.segment;
  args.x_offset = spot.offset;
  const auto stage = [&](std::byte* to, const void* from, std::int64_t bytes) {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice,
                          context_.comm_stream()),
          "copy of x");
  };
  Carver carver(block.data);
  const auto staged = plan::RecvArrays::carve(carver, args.format, args.block_rows);
  if (spot.segment < 0) stage(staged.x, params.x, x_bytes);
  Carver beside(block.data);
  const auto weights =
      spot.segment < 0
          ? staged.topk_weights
          : plan::RecvArrays::carve(beside, args.format, args.block_rows, block.data).topk_weights;
  stage(weights, params.topk_weights, args.block_rows * args.format.topk_weights_bytes);
}

void Internode::combine(const deep_ep::internode::CombineParams& params,
                        const Backend::Results& block) {
  require_aligned(params.x, "x");
  for (const std::byte* bias : params.bias) require_aligned(bias, "bias");
  internode::CombineArgs args;
  args.comm = comm(params.call);
  args.rails = rails(params.call);
  args.bias[0] = params.bias[0];
  args.bias[1] = params.bias[1];
  args.format = combine_format(params);
  args.item = make_item((args.format.topk_weights_bytes + 15) / 16 * 16, args.format.x_bytes,
                        internode::kMostPart);
  args.send_rdma_head = params.routing.send_rdma_head;
  args.send_nvl_head = params.routing.send_nvl_head;
  args.go = begins_early() ? go_ : 0;
  args.record_sums = params.routing.recv_rdma_rank_prefix_sum;
  args.row_sums = params.routing.recv_gbl_rank_prefix_sum;
  args.num_records = params.routing.nvl_head_rows;
  offer_rows(params, block, args);
  args.combined_x = params.combined_x;
  args.combined_topk_weights = params.combined_topk_weights;
  args.wait_stats = params.wait_stats;
  check(parts_->launch(args, sum_type(params.dtype), sms_of(context_, params.call),
                       context_.comm_stream()),
        "launch of combine");
}

void Internode::tell(bool leaves) noexcept {
  try {
    const DeviceGuard guard(context_.device());
    check(parts_->launch(internode::TellArgs{context_.comm({}), rails({}), leaves},
                         context_.fault_stream()),
          "launch of tell");
  } catch (const std::exception& failure) {
    log::warn("rank {}: the other nodes cannot be told of a fault, or that it leaves: {}",
              context_.global_rank(), failure.what());
  }
}

void Internode::tell_fault() noexcept {
  if (heap_ == nullptr) return;
  heap_->abandon();  // the other nodes' answers may still be on their way
  tell(false);
}

}  // namespace deep_ep::cuda
