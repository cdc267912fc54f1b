#include "events.hpp"

#include "scalars.hpp"

namespace deep_ep::python {

Stream stream_of(std::uintptr_t native, int device) {
  Stream stream;
  stream.native = reinterpret_cast<void*>(native);
  if (device >= 0) stream.device = {DeviceType::kCuda, device};
  return stream;
}

CallOptions options_of(const OwnedBuffer& buffer, const nb::tuple& parts) {
  CallOptions options;
  if (parts.size() == 0) {
    options.stream = buffer.current_stream();
    return options;
  }
  options.stream = stream_of(nb::cast<std::uintptr_t>(parts[0]), nb::cast<int>(parts[1]));
  if (!parts[2].is_none()) options.previous_event = nb::cast<EventHandle>(parts[2]);
  options.async_finish = scalar_of<bool>(parts[3], "async_finish");
  options.allocate_on_comm_stream = scalar_of<bool>(parts[4], "allocate_on_comm_stream");
  return options;
}

nb::object event_of(const CallOptions& options, const EventHandle& event) {
  return options.async_finish ? nb::cast(event) : nb::none();
}

void bind_events(nb::module_& module) {
  nb::class_<EventHandle>(module, "EventHandle")
      .def("__init__", [](EventHandle* self, std::uintptr_t stream,
                          int device) { new (self) EventHandle(stream_of(stream, device)); })
      .def(
          "stream_wait",
          [](const EventHandle& event, std::uintptr_t stream, int device) {
            event.current_stream_wait(stream_of(stream, device));
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def("host_wait", &EventHandle::host_wait, nb::call_guard<nb::gil_scoped_release>())
      .def("query", &EventHandle::query);
}

}  // namespace deep_ep::python
