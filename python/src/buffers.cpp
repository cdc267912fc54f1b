#include "buffers.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.hpp"
#include "events.hpp"
#include "handles.hpp"
#include "low_latency.hpp"
#include "owned_buffer.hpp"
#include "scalars.hpp"

namespace deep_ep::python {

namespace {

Config config_of(const nb::tuple& parts) {
  Config config;
  config.num_sms = scalar_of<int>(parts[0], "num_sms");
  config.num_max_nvl_chunked_send_tokens =
      scalar_of<int>(parts[1], "num_max_nvl_chunked_send_tokens");
  config.num_max_nvl_chunked_recv_tokens =
      scalar_of<int>(parts[2], "num_max_nvl_chunked_recv_tokens");
  config.num_max_rdma_chunked_send_tokens =
      scalar_of<int>(parts[3], "num_max_rdma_chunked_send_tokens");
  config.num_max_rdma_chunked_recv_tokens =
      scalar_of<int>(parts[4], "num_max_rdma_chunked_recv_tokens");
  return config;
}

/// `parts`: what dispatch_grouped returned for its groups.
RowGroups groups_of(const Library& library, nb::handle parts) {
  constexpr std::size_t kTensors = 4;
  if (!is_tuple_of(parts, kTensors))
    throw wrong_tuple("groups", parts, "the RowGroups that dispatch_grouped returned");
  const auto part = [&](int i) { return library.view(parts[i], "an element of groups"); };
  return {part(0), part(1), part(2), part(3)};
}

nb::object result_of_groups(const Library& library, const RowGroups& groups) {
  return nb::make_tuple(library.make(groups.group_offsets), library.make(groups.grouped_rows),
                        library.make(groups.recv_rows), library.make(groups.weights));
}

/// What dispatch and combine take for a handle: one of 6 tensors, which `one_node_of` views, or of
/// 10 with several nodes.
template <class OneNode, class SeveralNodes>
void set_handle(const Library& library, const nb::tuple& parts, OneNode& handle,
                SeveralNodes& internode,
                IntranodeHandle (*one_node_of)(const Library&, const nb::tuple&)) {
  if (parts.size() == kInternodeTensors) {
    internode = internode_handle_of(library, parts);
  } else {
    handle = one_node_of(library, parts);
  }
}

/// `parts`: a PreparedDispatch.
PreparedDispatch prepared_of(const Library& library, const nb::tuple& parts) {
  PreparedDispatch prepared;
  set_handle(library, nb::cast<nb::tuple>(parts[0]), prepared.handle, prepared.internode_handle,
             intranode_handle_of);
  prepared.num_recv_tokens = scalar_of<std::int64_t>(parts[1], "prepared.num_recv_tokens");
  prepared.num_recv_tokens_per_expert_list = nb::cast<std::vector<std::int32_t>>(parts[2]);
  prepared.num_experts = scalar_of<int>(parts[3], "prepared.num_experts");
  prepared.expert_alignment = scalar_of<int>(parts[4], "prepared.expert_alignment");
  prepared.num_rdma_recv_tokens =
      scalar_of<std::int64_t>(parts[5], "prepared.num_rdma_recv_tokens");
  return prepared;
}

void construct(OwnedBuffer* self, std::shared_ptr<Bootstrap> bootstrap, const nb::dict& given,
               const std::shared_ptr<TorchAllocator>& allocator) {
  BufferOptions options;
  const auto number = [&](const char* name) { return scalar_of<std::int64_t>(given[name], name); };
  const auto small = [&](const char* name) { return scalar_of<int>(given[name], name); };
  const auto flag = [&](const char* name) { return scalar_of<bool>(given[name], name); };
  if (const int device = small("device"); device >= 0) options.device = {DeviceType::kCuda, device};
  options.num_nvl_bytes = number("num_nvl_bytes");
  options.num_rdma_bytes = number("num_rdma_bytes");
  options.low_latency_mode = flag("low_latency_mode");
  options.num_qps_per_rank = small("num_qps_per_rank");
  options.allow_nvlink_for_low_latency_mode = flag("allow_nvlink_for_low_latency_mode");
  options.allow_mnnvl = flag("allow_mnnvl");
  options.use_fabric = flag("use_fabric");
  options.explicitly_destroy = flag("explicitly_destroy");
  options.enable_shrink = flag("enable_shrink");
  options.timeout = std::chrono::milliseconds(number("timeout_ms"));
  options.num_threads = small("num_threads");
  new (self) OwnedBuffer(std::move(bootstrap), options, allocator);
}

nb::tuple get_dispatch_layout(OwnedBuffer& self, const Library& library, nb::handle topk_idx,
                              int num_experts, const nb::tuple& options) {
  const TensorView ids = library.view(topk_idx, "topk_idx");
  const CallOptions call = options_of(self, options);
  DispatchLayout layout;
  {
    const NoGil no_gil;
    layout = self.get().get_dispatch_layout(ids, num_experts, call);
  }
  return nb::make_tuple(library.make(layout.num_tokens_per_rank),
                        library.make(layout.num_tokens_per_rdma_rank),
                        library.make(layout.num_tokens_per_expert),
                        library.make(layout.is_token_in_rank), event_of(call, layout.event));
}

/// `payload`: (x, x_scales); `topk`: (topk_idx, topk_weights).
void set_payload(const Library& library, DispatchArgs& args, const nb::tuple& payload,
                 const nb::tuple& topk) {
  args.x = library.view(payload[0], "x");
  args.x_scales = library.view(payload[1], "x_scales");
  args.topk_idx = library.view(topk[0], "topk_idx");
  args.topk_weights = library.view(topk[1], "topk_weights");
}

/// `layout`: (per rank, per expert, in rank).
void set_layout(const Library& library, DispatchArgs& args, const nb::tuple& layout) {
  args.layout.num_tokens_per_rank = library.view(layout[0], "num_tokens_per_rank");
  args.layout.num_tokens_per_expert = library.view(layout[1], "num_tokens_per_expert");
  args.layout.is_token_in_rank = library.view(layout[2], "is_token_in_rank");
}

/// What few calls give: (num_experts, prepared, outputs, group_rows, groups). `outputs`: recv_x,
/// its scales, recv_topk_idx, recv_topk_weights, grouped_x, its scales.
void set_extras(const Library& library, DispatchArgs& args, const nb::tuple& extras) {
  args.num_experts = scalar_of<int>(extras[0], "num_experts");
  if (!extras[1].is_none()) args.prepared = prepared_of(library, nb::cast<nb::tuple>(extras[1]));
  const auto outputs = nb::cast<nb::tuple>(extras[2]);
  args.recv_x = library.output(outputs[0], "recv_x");
  args.recv_x_scales = library.output(outputs[1], "recv_x_scales");
  args.recv_topk_idx = library.output(outputs[2], "recv_topk_idx");
  args.recv_topk_weights = library.output(outputs[3], "recv_topk_weights");
  args.grouped_x = library.output(outputs[4], "grouped_x");
  args.grouped_x_scales = library.output(outputs[5], "grouped_x_scales");
  args.group_rows = nb::cast<bool>(extras[3]);
  if (!extras[4].is_none()) args.groups = groups_of(library, extras[4]);
}

/// None in place of an output that the caller brought, who has it.
nb::object result_beside(const Library& library, const TensorView& given, const Tensor& result) {
  return given.defined() ? nb::none() : library.make(result);
}
/// The same of elements like those of `like`.
nb::object rows_beside(const Library& library, const TensorView& given, const Tensor& result,
                       nb::handle like) {
  return given.defined() ? nb::none() : library.make_like(result, like);
}

/// (received rows, grouped rows, grouped_x, its scales, groups), the last four with group_rows and
/// the groups unless they were given.
nb::object result_of_extras(const Library& library, const DispatchArgs& args,
                            const DispatchResult& result, nb::handle x) {
  const std::int64_t rows = result.recv_x.shape[0];
  if (!args.group_rows) return nb::make_tuple(rows);
  return nb::make_tuple(rows, result.grouped_x.shape[0],
                        rows_beside(library, args.grouped_x, result.grouped_x, x),
                        result_beside(library, args.grouped_x_scales, result.grouped_x_scales),
                        args.groups ? nb::none() : result_of_groups(library, result.groups));
}

/// What of the coming handle the caller has.
GivenOfHandle given_of(const nb::tuple& layout, nb::handle extras) {
  GivenOfHandle given;
  given.is_token_in_rank = layout[2];
  if (!extras.is_none() && !extras[1].is_none()) given.prepared = extras[1][0];
  return given;
}

/// `numbers`: (expert_alignment, num_worst_tokens).
nb::tuple dispatch(OwnedBuffer& self, const Library& library, const nb::tuple& payload,
                   const nb::tuple& topk, nb::handle handle, const nb::tuple& layout,
                   const nb::tuple& numbers, const nb::tuple& config, nb::handle wait_stats,
                   const nb::tuple& options, nb::handle extras) {
  DispatchArgs args;
  set_payload(library, args, payload, topk);
  if (!handle.is_none())
    set_handle(library, require_handle(handle, self.get().num_nodes()), args.handle,
               args.internode_handle, used_of_handle);
  set_layout(library, args, layout);
  args.expert_alignment = scalar_of<int>(numbers[0], "expert_alignment");
  args.num_worst_tokens = scalar_of<std::int64_t>(numbers[1], "num_worst_tokens");
  args.config = config_of(config);
  args.dispatch_wait_recv_cost_stats = library.output(wait_stats, kWaitStats);
  args.options = options_of(self, options);
  if (!extras.is_none()) set_extras(library, args, nb::cast<nb::tuple>(extras));
  DispatchResult result;
  {
    const NoGil no_gil;
    result = self.get().dispatch(args);
  }
  return nb::make_tuple(
      rows_beside(library, args.recv_x, result.recv_x, payload[0]),
      result_beside(library, args.recv_x_scales, result.recv_x_scales),
      result_beside(library, args.recv_topk_idx, result.recv_topk_idx),
      result_beside(library, args.recv_topk_weights, result.recv_topk_weights),
      nb::cast(result.num_recv_tokens_per_expert_list),
      result_of_handle(library, result.handle, result.internode_handle, given_of(layout, extras)),
      event_of(args.options, result.event),
      extras.is_none() ? nb::none() : result_of_extras(library, args, result, payload[0]));
}

/// Returns what prepared_of takes.
nb::tuple prepare_dispatch(OwnedBuffer& self, const Library& library, const nb::tuple& payload,
                           const nb::tuple& topk, const nb::tuple& layout, int num_experts,
                           int expert_alignment, const nb::tuple& config,
                           const nb::tuple& options) {
  DispatchArgs args;
  set_payload(library, args, payload, topk);
  set_layout(library, args, layout);
  args.num_experts = num_experts;
  args.expert_alignment = expert_alignment;
  args.config = config_of(config);
  args.options = options_of(self, options);
  PreparedDispatch prepared;
  {
    const NoGil no_gil;
    prepared = self.get().prepare_dispatch(args);
  }
  return nb::make_tuple(result_of_handle(library, prepared.handle, prepared.internode_handle,
                                         given_of(layout, nb::none())),
                        prepared.num_recv_tokens,
                        nb::cast(prepared.num_recv_tokens_per_expert_list), prepared.num_experts,
                        prepared.expert_alignment, prepared.num_rdma_recv_tokens);
}

/// `payload`: (x, topk_weights, bias or None, bias or None).
nb::tuple combine(OwnedBuffer& self, const Library& library, const nb::tuple& payload,
                  nb::handle handle, const nb::tuple& config, nb::handle wait_stats,
                  const nb::tuple& options, nb::handle groups) {
  CombineArgs args;
  args.x = library.view(payload[0], "x");
  args.topk_weights = library.view(payload[1], "topk_weights");
  args.bias = {library.view(payload[2], "bias"), library.view(payload[3], "bias")};
  set_handle(library, require_handle(handle, self.get().num_nodes()), args.handle,
             args.internode_handle, used_of_handle);
  args.config = config_of(config);
  args.combine_wait_recv_cost_stats = library.output(wait_stats, kWaitStats);
  args.options = options_of(self, options);
  if (!groups.is_none()) args.groups = groups_of(library, groups);
  CombineResult result;
  {
    const NoGil no_gil;
    result = self.get().combine(args);
  }
  return nb::make_tuple(library.make(result.combined_x), library.make(result.combined_topk_weights),
                        event_of(args.options, result.event));
}

void bind_config(nb::module_& module) {
  module.def("validate_config", [](const nb::tuple& parts) { config_of(parts).validate(); });
  module.def("get_nvl_buffer_size_hint",
             [](const nb::tuple& parts, std::int64_t hidden_bytes, int num_ranks) {
               return config_of(parts).get_nvl_buffer_size_hint(hidden_bytes, num_ranks);
             });
  module.def("get_rdma_buffer_size_hint",
             [](const nb::tuple& parts, std::int64_t hidden_bytes, int num_ranks) {
               return config_of(parts).get_rdma_buffer_size_hint(hidden_bytes, num_ranks);
             });
}

/// What this rank has given to the network, by name.
nb::dict network_counts(OwnedBuffer& self) {
  const NetworkCounts counts = self.get().network_counts();
  nb::dict named;
  named["rows"] = counts.rows;
  named["row_bytes"] = counts.row_bytes;
  named["puts"] = counts.puts;
  named["put_bytes"] = counts.put_bytes;
  named["signals"] = counts.signals;
  return named;
}

/// What callers of DeepEP ask its runtime about nodes, each of which is a rank of "rdma" there.
void bind_nodes(nb::class_<OwnedBuffer>& buffer) {
  const auto node_of = [](OwnedBuffer& self) {
    return self.get().rank() / self.get().num_ranks_per_node();
  };
  buffer.def("get_num_rdma_ranks", [](OwnedBuffer& self) { return self.get().num_nodes(); })
      .def("get_rdma_rank", node_of)
      // Which rank the others of its index look to first: of node 0, counted over all or by node.
      .def("get_root_rdma_rank",
           [](OwnedBuffer& self, bool global) {
             return global ? self.get().rank() % self.get().num_ranks_per_node() : 0;
           })
      .def(
          "is_internode_available",
          [](OwnedBuffer& self) { return self.get().is_available() && self.get().num_nodes() > 1; })
      .def("get_local_device_id", [](OwnedBuffer& self) {
        const Device device = self.get().device();
        return device.type == DeviceType::kCuda ? device.index : -1;
      });
}

}  // namespace

void bind_buffers(nb::module_& module) {
  bind_config(module);
  nb::class_<OwnedBuffer> buffer(module, "Buffer");
  bind_low_latency(module, buffer);
  bind_nodes(buffer);
  buffer.def("__init__", &construct, nb::arg(), nb::arg(), nb::arg().none())
      .def("get_dispatch_layout", &get_dispatch_layout)
      .def("dispatch", &dispatch, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none())
      .def("prepare_dispatch", &prepare_dispatch)
      .def("combine", &combine, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none(),
           nb::arg(), nb::arg().none())
      .def(
          "destroy", [](OwnedBuffer& self) { self.get().destroy(); }, nb::call_guard<NoGil>())
      .def(
          "barrier", [](OwnedBuffer& self) { self.get().barrier(); }, nb::call_guard<NoGil>())
      .def(
          "reserve", [](OwnedBuffer& self, std::int64_t bytes) { self.get().reserve(bytes); },
          nb::call_guard<NoGil>())
      .def("check", [](OwnedBuffer& self) { self.get().check(); })
      .def("is_available", [](OwnedBuffer& self) { return self.get().is_available(); })
      .def("transport", [](OwnedBuffer& self) { return self.get().transport(); })
      .def("operations_json", [](OwnedBuffer& self) { return self.get().operations_json(); })
      .def("mapped_bytes", [](OwnedBuffer& self) { return self.get().mapped_bytes(); })
      .def("live_bytes", [](OwnedBuffer& self) { return self.get().live_bytes(); })
      .def("network_counts", &network_counts)
      .def("set_timeout_ms",
           [](OwnedBuffer& self, std::int64_t milliseconds) {
             self.get().set_timeout(std::chrono::milliseconds(milliseconds));
           })
      .def("comm_stream",
           [](OwnedBuffer& self) {
             return reinterpret_cast<std::uintptr_t>(self.get().comm_stream().native);
           })
      .def("local_buffer", [](OwnedBuffer& self, const Library& library, int dtype,
                              std::int64_t offset) {
        return library.make(self.get().get_local_buffer_tensor(static_cast<DType>(dtype), offset));
      });
}

}  // namespace deep_ep::python
