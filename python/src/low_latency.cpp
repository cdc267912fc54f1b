#include "low_latency.hpp"

#include "arrays.hpp"
#include "events.hpp"
#include "scalars.hpp"

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

/// `given`: (src_info, layout_range, M, hidden, num_experts), a tuple.
LowLatencyHandle handle_of(const Library& library, nb::handle given) {
  constexpr std::size_t kParts = 5;
  if (!is_tuple_of(given, kParts))
    throw wrong_tuple("handle", given, "the tuple of 5 that low_latency_dispatch returned");
  const auto parts = nb::borrow<nb::tuple>(given);
  LowLatencyHandle handle;
  handle.src_info = library.view(parts[0], "handle[0]");
  handle.layout_range = library.view(parts[1], "handle[1]");
  handle.num_max_dispatch_tokens_per_rank = scalar_of<int>(parts[2], "handle[2]");
  handle.hidden = scalar_of<std::int64_t>(parts[3], "handle[3]");
  handle.num_experts = scalar_of<int>(parts[4], "handle[4]");
  return handle;
}

/// `arrays`: (x, topk_idx, cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats);
/// `shape`: (M, num_experts); `flags`: (use_fp8, round_scale, use_ue8m0, return_recv_hook).
nb::tuple dispatch(OwnedBuffer& self, const Library& library, const nb::tuple& arrays,
                   const nb::tuple& shape, const nb::tuple& flags, const nb::tuple& options) {
  LowLatencyDispatchArgs args;
  args.x = library.view(arrays[0], "x");
  args.topk_idx = library.view(arrays[1], "topk_idx");
  args.cumulative_local_expert_recv_stats =
      library.output(arrays[2], "cumulative_local_expert_recv_stats");
  args.dispatch_wait_recv_cost_stats = library.output(arrays[3], kWaitStats);
  args.num_max_dispatch_tokens_per_rank =
      scalar_of<int>(shape[0], "num_max_dispatch_tokens_per_rank");
  args.num_experts = scalar_of<int>(shape[1], "num_experts");
  args.use_fp8 = scalar_of<bool>(flags[0], "use_fp8");
  args.round_scale = scalar_of<bool>(flags[1], "round_scale");
  args.use_ue8m0 = scalar_of<bool>(flags[2], "use_ue8m0");
  args.return_recv_hook = scalar_of<bool>(flags[3], "return_recv_hook");
  args.options = options_of(self, options);
  LowLatencyDispatchResult result;
  {
    const NoGil no_gil;
    result = self.get().low_latency_dispatch(args);
  }
  const nb::object handle =
      nb::make_tuple(library.make(result.handle.src_info), library.make(result.handle.layout_range),
                     shape[0], result.handle.hidden, shape[1]);
  return nb::make_tuple(library.make_like(result.recv_x, arrays[0]),
                        library.make(result.recv_x_scales), library.make(result.recv_count), handle,
                        event_of(args.options, result.event), hook_of(std::move(result.recv_hook)));
}

/// `arrays`: (x, topk_idx, topk_weights, out or None, combine_wait_recv_cost_stats or None);
/// `flags`: (use_logfmt, use_fp8, zero_copy, return_recv_hook).
nb::tuple combine(OwnedBuffer& self, const Library& library, const nb::tuple& arrays,
                  nb::handle handle, const nb::tuple& flags, const nb::tuple& options) {
  LowLatencyCombineArgs args;
  args.x = library.view(arrays[0], "x");
  args.topk_idx = library.view(arrays[1], "topk_idx");
  args.topk_weights = library.view(arrays[2], "topk_weights");
  args.out = library.output(arrays[3], "out");
  args.combine_wait_recv_cost_stats = library.output(arrays[4], kWaitStats);
  args.handle = handle_of(library, handle);
  args.use_logfmt = scalar_of<bool>(flags[0], "use_logfmt");
  args.use_fp8 = scalar_of<bool>(flags[1], "use_fp8");
  args.zero_copy = scalar_of<bool>(flags[2], "zero_copy");
  args.return_recv_hook = scalar_of<bool>(flags[3], "return_recv_hook");
  args.options = options_of(self, options);
  LowLatencyCombineResult result;
  {
    const NoGil no_gil;
    result = self.get().low_latency_combine(args);
  }
  // `out` is the caller's, who has it.
  return nb::make_tuple(args.out.defined() ? nb::none() : library.make(result.combined_x),
                        event_of(args.options, result.event), hook_of(std::move(result.recv_hook)));
}

}  // namespace

void bind_low_latency(nb::module_& module, nb::class_<OwnedBuffer>& buffer) {
  nb::class_<Hook>(module, "Hook").def("__call__", &Hook::operator());
  module.def("get_low_latency_rdma_size_hint", [](int max_tokens, std::int64_t hidden,
                                                  int num_ranks, int num_experts) {
    return Buffer::get_low_latency_rdma_size_hint(max_tokens, hidden, num_ranks, num_experts);
  });
  buffer.def("low_latency_dispatch", &dispatch)
      .def("low_latency_combine", &combine)
      .def("clean_low_latency_buffer",
           [](OwnedBuffer& self, int max_tokens, std::int64_t hidden, int num_experts) {
             const NoGil no_gil;
             self.get().clean_low_latency_buffer(max_tokens, hidden, num_experts);
           })
      .def("get_next_low_latency_combine_buffer",
           [](OwnedBuffer& self, const Library& library, nb::handle handle) {
             return library.make(
                 self.get().get_next_low_latency_combine_buffer(handle_of(library, handle)));
           })
      .def("low_latency_update_mask_buffer",
           [](OwnedBuffer& self, int rank, bool masked) {
             const NoGil no_gil;
             self.get().low_latency_update_mask_buffer(rank, masked);
           })
      .def("low_latency_query_mask_buffer",
           [](OwnedBuffer& self, const Library& library, nb::handle mask) {
             const TensorView view = library.output(mask, "mask_status");
             const Stream stream = self.current_stream();
             const NoGil no_gil;
             self.get().low_latency_query_mask_buffer(view, stream);
           })
      .def("low_latency_clean_mask_buffer", [](OwnedBuffer& self) {
        const NoGil no_gil;
        self.get().low_latency_clean_mask_buffer();
      });
}

}  // namespace deep_ep::python
