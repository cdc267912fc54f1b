#include "buffers.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.hpp"
#include "events.hpp"
#include "low_latency.hpp"
#include "owned_buffer.hpp"

namespace deep_ep::python {

namespace {

Config config_of(const nb::tuple& parts) {
  Config config;
  config.num_sms = nb::cast<int>(parts[0]);
  config.num_max_nvl_chunked_send_tokens = nb::cast<int>(parts[1]);
  config.num_max_nvl_chunked_recv_tokens = nb::cast<int>(parts[2]);
  config.num_max_rdma_chunked_send_tokens = nb::cast<int>(parts[3]);
  config.num_max_rdma_chunked_recv_tokens = nb::cast<int>(parts[4]);
  return config;
}

IntranodeHandle handle_of(const nb::tuple& parts) {
  return {view_of(parts[0]), view_of(parts[1]), view_of(parts[2]),
          view_of(parts[3]), view_of(parts[4]), view_of(parts[5])};
}

nb::object result_of_handle(const IntranodeHandle& handle) {
  if (!handle.recv_src_idx.defined()) return nb::none();
  return nb::make_tuple(
      result_of(handle.rank_prefix_matrix), result_of(handle.channel_prefix_matrix),
      result_of(handle.recv_channel_prefix_matrix), result_of(handle.recv_src_idx),
      result_of(handle.is_token_in_rank), result_of(handle.send_head));
}

void construct(OwnedBuffer* self, std::shared_ptr<Bootstrap> bootstrap, const nb::dict& given,
               nb::object allocate) {
  BufferOptions options;
  const auto number = [&](const char* name) { return nb::cast<std::int64_t>(given[name]); };
  const auto flag = [&](const char* name) { return nb::cast<bool>(given[name]); };
  if (const std::int64_t device = number("device"); device >= 0)
    options.device = {DeviceType::kCuda, static_cast<int>(device)};
  options.num_nvl_bytes = number("num_nvl_bytes");
  options.num_rdma_bytes = number("num_rdma_bytes");
  options.low_latency_mode = flag("low_latency_mode");
  options.num_qps_per_rank = static_cast<int>(number("num_qps_per_rank"));
  options.allow_nvlink_for_low_latency_mode = flag("allow_nvlink_for_low_latency_mode");
  options.allow_mnnvl = flag("allow_mnnvl");
  options.use_fabric = flag("use_fabric");
  options.explicitly_destroy = flag("explicitly_destroy");
  options.enable_shrink = flag("enable_shrink");
  options.timeout = std::chrono::milliseconds(number("timeout_ms"));
  options.num_threads = static_cast<int>(number("num_threads"));
  new (self) OwnedBuffer(std::move(bootstrap), options, std::move(allocate));
}

nb::tuple get_dispatch_layout(OwnedBuffer& self, nb::handle topk_idx, int num_experts,
                              const nb::tuple& options) {
  const TensorView ids = view_of(topk_idx);
  const CallOptions call = options_of(options);
  DispatchLayout layout;
  {
    const NoGil no_gil;
    layout = self.get().get_dispatch_layout(ids, num_experts, call);
  }
  return nb::make_tuple(result_of(layout.num_tokens_per_rank),
                        result_of(layout.num_tokens_per_expert), result_of(layout.is_token_in_rank),
                        layout.event);
}

/// `payload`: (x, x_scales, topk_idx, topk_weights); `layout`: (per rank, per expert, in rank).
nb::tuple dispatch(OwnedBuffer& self, const nb::tuple& payload, nb::handle handle,
                   const nb::tuple& layout, int expert_alignment, std::int64_t num_worst_tokens,
                   const nb::tuple& config, nb::handle wait_stats, const nb::tuple& options) {
  DispatchArgs args;
  args.x = view_of(payload[0]);
  args.x_scales = view_of(payload[1]);
  args.topk_idx = view_of(payload[2]);
  args.topk_weights = view_of(payload[3]);
  if (!handle.is_none()) args.handle = handle_of(nb::cast<nb::tuple>(handle));
  args.layout.num_tokens_per_rank = view_of(layout[0]);
  args.layout.num_tokens_per_expert = view_of(layout[1]);
  args.layout.is_token_in_rank = view_of(layout[2]);
  args.expert_alignment = expert_alignment;
  args.num_worst_tokens = num_worst_tokens;
  args.config = config_of(config);
  args.dispatch_wait_recv_cost_stats = view_of(wait_stats);
  args.options = options_of(options);
  DispatchResult result;
  {
    const NoGil no_gil;
    result = self.get().dispatch(args);
  }
  return nb::make_tuple(result_of(result.recv_x), result_of(result.recv_x_scales),
                        result_of(result.recv_topk_idx), result_of(result.recv_topk_weights),
                        nb::cast(result.num_recv_tokens_per_expert_list),
                        result_of_handle(result.handle), result.event);
}

/// `payload`: (x, topk_weights, bias or None, bias or None).
nb::tuple combine(OwnedBuffer& self, const nb::tuple& payload, const nb::tuple& handle,
                  const nb::tuple& config, nb::handle wait_stats, const nb::tuple& options) {
  CombineArgs args;
  args.x = view_of(payload[0]);
  args.topk_weights = view_of(payload[1]);
  args.bias = {view_of(payload[2]), view_of(payload[3])};
  args.handle = handle_of(handle);
  args.config = config_of(config);
  args.combine_wait_recv_cost_stats = view_of(wait_stats);
  args.options = options_of(options);
  CombineResult result;
  {
    const NoGil no_gil;
    result = self.get().combine(args);
  }
  return nb::make_tuple(result_of(result.combined_x), result_of(result.combined_topk_weights),
                        result.event);
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

}  // namespace

void bind_buffers(nb::module_& module) {
  bind_config(module);
  nb::class_<OwnedBuffer> buffer(module, "Buffer");
  bind_low_latency(module, buffer);
  buffer.def("__init__", &construct, nb::arg(), nb::arg(), nb::arg().none())
      .def("get_dispatch_layout", &get_dispatch_layout)
      .def("dispatch", &dispatch, nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg().none(), nb::arg())
      .def("combine", &combine, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
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
      .def("set_timeout_ms",
           [](OwnedBuffer& self, std::int64_t milliseconds) {
             self.get().set_timeout(std::chrono::milliseconds(milliseconds));
           })
      .def("comm_stream",
           [](OwnedBuffer& self) {
             return reinterpret_cast<std::uintptr_t>(self.get().comm_stream().native);
           })
      .def("local_buffer", [](OwnedBuffer& self, int dtype, std::int64_t offset) {
        return result_of(self.get().get_local_buffer_tensor(static_cast<DType>(dtype), offset));
      });
}

}  // namespace deep_ep::python
