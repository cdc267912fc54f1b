#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "deep_ep/allocator.hpp"
#include "deep_ep/bootstrap.hpp"
#include "deep_ep/config.hpp"
#include "deep_ep/event.hpp"
#include "deep_ep/export.hpp"
#include "deep_ep/handle.hpp"
#include "deep_ep/low_latency.hpp"
#include "deep_ep/tensor.hpp"

namespace deep_ep {

/// How a Buffer is made. All ranks pass the same values, `device.index` and `num_threads` excepted.
struct BufferOptions {
  Device device{};  ///< host, or the CUDA device of this rank
  std::int64_t num_nvl_bytes =
      0;  ///< starting size of this rank's mapped memory, see Config; raised if it is too small
  std::int64_t num_rdma_bytes =
      0;  ///< starting size of the memory for low latency and for other nodes
  /// With several nodes: whether there is memory for low latency, twice num_rdma_bytes (on GPUs
  /// thrice) beside what other calls take; the same on all ranks. One node has it anyway.
  bool low_latency_mode = false;
  int num_qps_per_rank = 24;
  bool allow_nvlink_for_low_latency_mode = true;
  bool allow_mnnvl = false;
  bool use_fabric = false;
  bool explicitly_destroy =
      false;  ///< accepted for callers of DeepEP; the destructor always releases
  bool enable_shrink = false;
  /// How long one wait for other ranks may take, a year at most. 0: DEEP_EP_TIMEOUT_MS, else 100 s.
  std::chrono::milliseconds timeout{0};
  /// Host worker threads of this rank. 0: DEEP_EP_NUM_THREADS, else the cores divided by the ranks
  /// of this machine.
  int num_threads = 0;
  /// Optional: gives the memory of results. Ranks may differ in it.
  std::shared_ptr<Allocator> allocator{};
};

/// Arguments of a dispatch. Either `handle` is given (cached: x and x_scales move as they did
/// before; nothing else may be given), or `layout`, usually with topk_idx and topk_weights, or
/// `num_experts` with topk_idx.
struct DispatchArgs {
  /// [N, H] contiguous rows, H * size_of(dtype) a multiple of 16 bytes, in any memory of the
  /// Buffer's device, on GPUs from a multiple of 16 bytes on. N may be 0.
  TensorView x{};
  /// Optional [N, S], float32 or int32 (packed), any strides: scales of x.
  TensorView x_scales{};
  /// Handle of an earlier dispatch with the same N; with several nodes internode_handle takes its
  /// place.
  std::optional<IntranodeHandle> handle{};
  /// From get_dispatch_layout, or the caller's own: num_tokens_per_rank and is_token_in_rank are
  /// required, num_tokens_per_expert is needed for the per-expert counts.
  DispatchLayout layout{};
  /// Above 0, in place of `layout`: the call finds the layout of topk_idx itself, for so many
  /// experts. The handle has its is_token_in_rank.
  int num_experts = 0;
  TensorView topk_idx{};      ///< optional [N, K] int32 or int64: expert ids, -1 for none
  TensorView topk_weights{};  ///< optional [N, K] float32, with topk_idx
  /// num_recv_tokens_per_expert_list is rounded up to a multiple of it.
  int expert_alignment = 1;
  /// Above 0: results have this many rows and the call never waits for counts on the host; needs
  /// topk_idx. Fewer rows than arrive is Error(kCapacity) on every rank.
  std::int64_t num_worst_tokens = 0;
  Config config{};
  /// Optional int64 [R], on the Buffer's device: += the longest wait for each source, in ns (host)
  /// or SM cycles (CUDA, where the wait for counts before the rows is not part of it). Over several
  /// nodes for each rank that this one waits for itself: what others pass on here counts as theirs.
  TensorView dispatch_wait_recv_cost_stats{};
  CallOptions options{};

  /// From prepare_dispatch, in place of its counting: nothing waits for counts. Other arguments are
  /// those of that call (layout, num_experts and expert_alignment are not looked at again); without
  /// handle and num_worst_tokens. Ranks agree on whether it is given.
  std::optional<PreparedDispatch> prepared{};

  // Outputs that the caller brings, each optional: contiguous memory of the Buffer's device with
  // the result's dtype and columns, at least as many rows as the result has, on GPUs from a
  // multiple of 16 bytes on. The result's tensor is then a view of its first rows, and the caller
  // keeps it alive. Peers write to memory that they map: recv_x that lies in a result of this
  // Buffer (recv_x of an earlier dispatch, say) they write directly, and nothing else may use it
  // meanwhile. Anything else arrives in a block of the Buffer, which the call gives back, and is
  // copied from there once all rows are here. Which of the two is each rank's own matter.
  TensorView recv_x{};
  TensorView recv_x_scales{};
  TensorView recv_topk_idx{};
  TensorView recv_topk_weights{};

  /// True: the result has the rows once more, grouped by local expert and padded to
  /// expert_alignment. Needs topk_idx or, with a handle, `groups`.
  bool group_rows = false;
  /// With a handle: groups of the dispatch that it is of.
  std::optional<RowGroups> groups{};
  /// Outputs as above, with group_rows: written directly, wherever they lie. With num_worst_tokens
  /// the rows of grouped_x say how many grouped rows there may be; more are Error(kCapacity).
  TensorView grouped_x{};
  TensorView grouped_x_scales{};

  /// With several nodes: as `handle`.
  std::optional<InternodeHandle> internode_handle{};
};

/// Rows are in (source rank, token index) order. Nr = num_recv_tokens, or num_worst_tokens if that
/// was given.
struct DispatchResult {
  Tensor recv_x;         ///< [Nr, H], dtype of x; rows behind the last received one are undefined
  Tensor recv_x_scales;  ///< [Nr, S] row-major, if x_scales was given
  Tensor recv_topk_idx;  ///< [Nr, K], dtype of topk_idx: local expert id, -1 for experts of other
                         ///< ranks and unused rows
  Tensor recv_topk_weights;  ///< [Nr, K] float32, 0 where recv_topk_idx is -1
  /// Rows for each local expert, rounded up to expert_alignment. Empty if cached, without counts,
  /// or with num_worst_tokens.
  std::vector<std::int32_t> num_recv_tokens_per_expert_list;
  /// Received rows. -1 with num_worst_tokens (see handle.rank_prefix_matrix); the rows of the given
  /// handle's recv_src_idx if cached.
  std::int64_t num_recv_tokens = 0;
  IntranodeHandle handle;  ///< undefined tensors if cached, or with several nodes
  EventHandle event;       ///< of the end of the call; see Buffer on who has waited for it

  // With group_rows. G is the sum of num_recv_tokens_per_expert_list or, with num_worst_tokens, the
  // rows of the given grouped_x, else Nr * K + min(L, Nr * K) * (expert_alignment - 1); if cached,
  // that of the given groups.
  Tensor grouped_x;  ///< [G, H], dtype of x: a copy of the received row for each local expert
  Tensor grouped_x_scales;  ///< [G, S] row-major, if x_scales was given
  RowGroups groups;         ///< if cached, the given ones

  InternodeHandle internode_handle;  ///< with several nodes, unless cached
};

struct CombineArgs {
  /// [Nr, H] bfloat16, float16 or float32, contiguous: one row per received row, already weighted
  /// and summed over this rank's experts. H * size_of(dtype) a multiple of 16 bytes. Longer than Nr
  /// is allowed (num_worst_tokens). Peers read it while the call runs; fastest
  /// where it lies in a result of dispatch of this Buffer. If the call throws, ranks
  /// that are threads of the same process may still read it until their own call has ended.
  TensorView x{};
  IntranodeHandle handle{};
  TensorView topk_weights{};         ///< optional [Nr, K] float32: summed like the rows
  std::array<TensorView, 2> bias{};  ///< optional [N, H], dtype of x: added in fp32 after the rows
  Config config{};
  TensorView combine_wait_recv_cost_stats{};  ///< as in DispatchArgs
  CallOptions options{};
  /// Of the dispatch that the handle is of: x is then [G, H] or longer, a row per grouped row, and
  /// each received row's local experts are summed here first: fma(weight, row, sum) in fp32 in
  /// ascending expert, rounded once to the dtype of x. groups.weights weighs them; undefined: rows
  /// count as they are. Padding is not read. topk_weights stays [Nr, K].
  std::optional<RowGroups> groups{};
  /// With several nodes: in place of `handle`.
  InternodeHandle internode_handle{};
};

struct CombineResult {
  /// [N, H], dtype of x: fp32 sum over the token's ranks in ascending order, rounded once. With
  /// several nodes each node's sum is rounded to the dtype of x, then these are summed in fp32 in
  /// ascending order and rounded.
  Tensor combined_x;
  Tensor combined_topk_weights;  ///< [N, K] float32, if topk_weights was given
  EventHandle event;             ///< as in DispatchResult
};

/// What this rank has given to the network so far.
struct NetworkCounts {
  std::int64_t rows = 0;       ///< tokens of dispatches, and sums of combines
  std::int64_t row_bytes = 0;  ///< of these, as they travel: padded, with what goes with them
  std::int64_t puts = 0;       ///< one for several rows; those of counts and faults included
  std::int64_t put_bytes = 0;
  std::int64_t signals = 0;
};

/// One rank's end of the exchange: memory that its peers map, and the calls that move tokens
/// through it.
///
/// Construction is collective; so are dispatch, combine and barrier, which every rank calls in the
/// same order. Calls on one Buffer come one at a time (any thread); an overlap is refused with
/// Error(kUsage). Several Buffers are independent of each other.
///
/// On the host a call has happened when it returns, unless async_finish. On GPUs it is queued on
/// the Buffer's communication stream when it returns, and unless async_finish the caller's stream
/// (CallOptions::stream, a stream of the Buffer's device) waits for it; only a dispatch that has
/// neither a handle nor num_worst_tokens nor was prepared, prepare_dispatch, and barrier, wait on
/// the host. What a kernel finds wrong,
/// or is told by another rank, is thrown by calls that come when it has ended, by check() and by
/// waiting for its event on the host. Results go back to the Buffer behind the work that the call's
/// stream, and any that Tensor::release named, have then.
///
/// After an Error of a collective call other than kUsage the Buffer is faulted on every rank:
/// further calls throw the same Error, destroy works and is local. Results obtained earlier stay
/// valid, also after destroy.
class DEEP_EP_API Buffer {
 public:
  /// Collective. Allocates, exchanges descriptors over `bootstrap` (kept; used by `reserve` too)
  /// and maps the peers' memory. Throws Error on every rank if it fails on one.
  explicit Buffer(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options = {});
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  /// Opens the peers' memory. The constructor calls it; calling it again does nothing.
  void sync();
  /// Releases everything but memory under live results. Local, idempotent, never throws for a
  /// faulted Buffer. Any thread but in a call of this Buffer: one that another thread is in ends
  /// with an Error first, on all ranks. In a process that was forked from the Buffer's: does
  /// nothing.
  void destroy();
  bool is_available() const;

  /// Which tokens of topk_idx ([N, K] int32 or int64, -1 for none) go where. Local. Throws
  /// Error(kInvalidArgument) if num_experts is not a positive multiple of the number of ranks or an
  /// id is outside [-1, num_experts); on GPUs a kernel looks at the ids, and a bad one is a fault
  /// of the Buffer on every rank.
  DispatchLayout get_dispatch_layout(const TensorView& topk_idx, int num_experts,
                                     const CallOptions& options = {});

  /// The counts of a coming dispatch, so that the caller can make its own outputs: takes the
  /// arguments of one that has no handle and no num_worst_tokens, moves nothing, and waits for the
  /// counts on the host. Then pass the result as DispatchArgs::prepared. Collective.
  PreparedDispatch prepare_dispatch(const DispatchArgs& args);
  /// Sends every token's row once to each rank that owns one of its experts. Collective.
  DispatchResult dispatch(const DispatchArgs& args);
  /// Brings rows back to their tokens and sums them. Collective.
  CombineResult combine(const CombineArgs& args);
  /// The paths that dispatch and combine take while all ranks are of one node.
  DispatchResult intranode_dispatch(const DispatchArgs& args);
  CombineResult intranode_combine(const CombineArgs& args);
  /// And with several nodes, on hosts. With num_worst_tokens that number bounds M too (see
  /// InternodeHandle).
  DispatchResult internode_dispatch(const DispatchArgs& args);
  CombineResult internode_combine(const CombineArgs& args);

  /// Low latency: small batches through buffers of a fixed size, num_rdma_bytes, without counts on
  /// the host; may be captured. With several nodes the Buffer needs low_latency_mode.
  /// Collective; the ranks of a call agree on all but N and round_scale. Calls with a hook have two
  /// parts; until the second one has run the result is live. Of each kind, dispatch and combine,
  /// two results may be live, and a call is refused with Error(kUsage) while the call before the
  /// last is.
  /// On GPUs a call takes all SMs: calls of several Buffers of one GPU come in the same order on
  /// all ranks, since the kernel of one may have to wait for that of another to end. A masked rank
  /// that goes in the middle of its messages may leave undefined rows in results of that call.
  LowLatencyDispatchResult low_latency_dispatch(const LowLatencyDispatchArgs& args);
  LowLatencyCombineResult low_latency_combine(const LowLatencyCombineArgs& args);
  /// Checks that calls of this shape fit into num_rdma_bytes. Nothing needs to be cleaned: buffers
  /// are kept usable between calls of any shape and mode. With enable_shrink it is collective: who
  /// does not come is masked.
  void clean_low_latency_buffer(int num_max_dispatch_tokens_per_rank, std::int64_t hidden,
                                int num_experts);
  /// [L, R * M, H] bfloat16 (rank-major [R, M, H]), for the outputs of the experts: pass it to the
  /// next combine as x, with zero_copy. Memory of the Buffer that no peer maps, allocated at the
  /// first call; valid until destroy, written again after the combine after the next.
  Tensor get_next_low_latency_combine_buffer(const LowLatencyHandle& handle);
  /// With enable_shrink: whether calls leave a rank out, as sender and as receiver. A rank that
  /// does not come within the timeout is masked by the rank that waits for it; on hosts it may show
  /// for a quarter more that it waits itself, and is waited for again then, a few times. Local;
  /// behind the calls so far.
  void low_latency_update_mask_buffer(int rank, bool masked);
  /// int32 [R] on the Buffer's device: 1 for each masked rank. Written behind the calls so far on
  /// `stream`.
  void low_latency_query_mask_buffer(const TensorView& mask, Stream stream = {});
  void low_latency_clean_mask_buffer();
  /// Bytes to pass as num_rdma_bytes for calls of this shape with up to num_topk experts a token,
  /// for values of at most two bytes (twice the hidden for float32). Never throws; a value below 1
  /// counts as 1. The same for any number of nodes. Formula: docs/memory.md.
  static std::int64_t get_low_latency_rdma_size_hint(int num_max_dispatch_tokens_per_rank,
                                                     std::int64_t hidden, int num_ranks,
                                                     int num_experts, int num_topk = 32) noexcept;

  /// All ranks have called it, and all earlier calls of this rank are done.
  void barrier();
  /// Collective: maps memory ahead so that `bytes` of results fit without growth. Throws on every
  /// rank if it fails on one, which the text names; the Buffer goes on working.
  void reserve(std::int64_t bytes);
  /// Memory that peers can write, for an Allocator to cut up: a block of this rank's segments,
  /// which grow if nothing fits. It goes back when it is released, on GPUs behind the work of the
  /// streams named then and of no other. On GPUs what had it before may still run on comm_stream():
  /// use it behind that, as calls of this Buffer do. Local; may be called while a call of this
  /// Buffer asks its allocator.
  Tensor allocate_mapped(std::int64_t bytes);
  /// Throws the Error that faulted this Buffer, if any.
  void check() const;

  int rank() const;
  int num_ranks() const;
  Device device() const;
  std::chrono::milliseconds timeout() const;
  /// Takes effect with the next call.
  void set_timeout(std::chrono::milliseconds timeout);
  /// The stream on which the calls run; a CUDA stream of the Buffer's, valid until destroy. A
  /// caller that works on it, and passes it as CallOptions::stream, spares the events between two
  /// streams.
  Stream comm_stream() const;
  /// Bytes of this rank's memory that peers map, and of those, bytes in live results.
  std::int64_t mapped_bytes() const;
  std::int64_t live_bytes() const;
  /// The rank's own heap from `offset` bytes on, as elements of `dtype`; the view keeps it mapped.
  /// It has no words by which ranks agree, so it may be filled while no rank is in a call and no
  /// result is live.
  Tensor get_local_buffer_tensor(DType dtype, std::int64_t offset = 0) const;
  /// Nodes, and which ranks are of one: those that map each other's memory, or, with
  /// DEEP_EP_RANKS_PER_NODE, so many neighbours each.
  int num_nodes() const;
  int num_ranks_per_node() const;
  /// Of all calls so far; on GPUs it waits for them, leaves out low latency, and counts a row that
  /// is written to mapped memory as put, its word as a signal. Zero while there is one node.
  NetworkCounts network_counts() const;
  /// How rows move between the ranks, in words, for logs and benchmarks.
  std::string transport() const;
  /// The last 256 operations (what, epoch, shapes, state, times in ns) as a JSON array, oldest
  /// first.
  std::string operations_json() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deep_ep
