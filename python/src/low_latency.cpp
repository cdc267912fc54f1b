#include "low_latency.hpp"

#include "arrays.hpp"
#include "events.hpp"

namespace deep_ep::python {

namespace {

/// The receiving half of a call, to be called once.
struct Hook {
  std::function<void()> receive;
  void operator()() const {
    const NoGil no_gil;
    receive();
  }
};

nb::object hook_of(std::function<void()>&& receive) {
  return receive ? nb::cast(Hook{std::move(receive)}) : nb::none();
}

/// (src_info, layout_range, M, hidden, num_experts)
LowLatencyHandle handle_of(const nb::tuple& parts) {
  LowLatencyHandle handle;
  handle.src_info = view_of(parts[0]);
  handle.layout_range = view_of(parts[1]);
  handle.num_max_dispatch_tokens_per_rank = nb::cast<int>(parts[2]);
  handle.hidden = nb::cast<std::int64_t>(parts[3]);
  handle.num_experts = nb::cast<int>(parts[4]);
  return handle;
}

/// `shape`: (M, num_experts); `flags`: (use_fp8, round_scale, use_ue8m0, return_recv_hook);
/// `stats`: (cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats).
nb::tuple dispatch(OwnedBuffer& self, nb::handle x, nb::handle topk_idx, const nb::tuple& shape,
                   const nb::tuple& flags, const nb::tuple& stats, const nb::tuple& options) {
  LowLatencyDispatchArgs args;
  args.x = view_of(x);
  args.topk_idx = view_of(topk_idx);
  args.num_max_dispatch_tokens_per_rank = nb::cast<int>(shape[0]);
  args.num_experts = nb::cast<int>(shape[1]);
  args.use_fp8 = nb::cast<bool>(flags[0]);
  args.round_scale = nb::cast<bool>(flags[1]);
  args.use_ue8m0 = nb::cast<bool>(flags[2]);
  args.return_recv_hook = nb::cast<bool>(flags[3]);
  args.cumulative_local_expert_recv_stats = view_of(stats[0]);
  args.dispatch_wait_recv_cost_stats = view_of(stats[1]);
  args.options = options_of(options);
  LowLatencyDispatchResult result;
  {
    const NoGil no_gil;
    result = self.get().low_latency_dispatch(args);
  }
  return nb::make_tuple(result_of(result.recv_x), result_of(result.recv_x_scales),
                        result_of(result.recv_count), result_of(result.handle.src_info),
                        result_of(result.handle.layout_range), result.event,
                        hook_of(std::move(result.recv_hook)));
}

/// `arrays`: (x, topk_idx, topk_weights, out or None); `flags`: (use_logfmt, use_fp8, zero_copy,
/// return_recv_hook).
nb::tuple combine(OwnedBuffer& self, const nb::tuple& arrays, const nb::tuple& handle,
                  const nb::tuple& flags, nb::handle wait_stats, const nb::tuple& options) {
  LowLatencyCombineArgs args;
  args.x = view_of(arrays[0]);
  args.topk_idx = view_of(arrays[1]);
  args.topk_weights = view_of(arrays[2]);
  args.out = view_of(arrays[3]);
  args.handle = handle_of(handle);
  args.use_logfmt = nb::cast<bool>(flags[0]);
  args.use_fp8 = nb::cast<bool>(flags[1]);
  args.zero_copy = nb::cast<bool>(flags[2]);
  args.return_recv_hook = nb::cast<bool>(flags[3]);
  args.combine_wait_recv_cost_stats = view_of(wait_stats);
  args.options = options_of(options);
  LowLatencyCombineResult result;
  {
    const NoGil no_gil;
    result = self.get().low_latency_combine(args);
  }
  // `out` is the caller's, who has it.
  return nb::make_tuple(args.out.defined() ? nb::none() : result_of(result.combined_x),
                        result.event, hook_of(std::move(result.recv_hook)));
}

}  // namespace

void bind_low_latency(nb::module_& module, nb::class_<OwnedBuffer>& buffer) {
  nb::class_<Hook>(module, "Hook").def("__call__", &Hook::operator());
  module.def("get_low_latency_rdma_size_hint", [](int max_tokens, std::int64_t hidden,
                                                  int num_ranks, int num_experts) {
    return Buffer::get_low_latency_rdma_size_hint(max_tokens, hidden, num_ranks, num_experts);
  });
  buffer.def("low_latency_dispatch", &dispatch)
      .def("low_latency_combine", &combine, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
           nb::arg())
      .def("clean_low_latency_buffer",
           [](OwnedBuffer& self, int max_tokens, std::int64_t hidden, int num_experts) {
             const NoGil no_gil;
             self.get().clean_low_latency_buffer(max_tokens, hidden, num_experts);
           })
      .def("get_next_low_latency_combine_buffer",
           [](OwnedBuffer& self, const nb::tuple& handle) {
             return result_of(self.get().get_next_low_latency_combine_buffer(handle_of(handle)));
           })
      .def("low_latency_update_mask_buffer",
           [](OwnedBuffer& self, int rank, bool masked) {
             const NoGil no_gil;
             self.get().low_latency_update_mask_buffer(rank, masked);
           })
      .def("low_latency_query_mask_buffer",
           [](OwnedBuffer& self, nb::handle mask, std::uintptr_t stream, int device) {
             const TensorView view = view_of(mask);
             const NoGil no_gil;
             self.get().low_latency_query_mask_buffer(view, stream_of(stream, device));
           })
      .def("low_latency_clean_mask_buffer", [](OwnedBuffer& self) {
        const NoGil no_gil;
        self.get().low_latency_clean_mask_buffer();
      });
}

}  // namespace deep_ep::python
