#pragma once

#include <nanobind/nanobind.h>

#include "deep_ep/handle.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// A stream of CUDA device `device`, or the calling thread with -1.
Stream stream_of(std::uintptr_t native, int device);

/// (stream, CUDA device or -1, previous EventHandle or None, async_finish, allocate_on_comm_stream)
CallOptions options_of(const nb::tuple& parts);

/// The event of a call for Python: None unless it is asynchronous.
nb::object event_of(const CallOptions& options, const EventHandle& event);

void bind_events(nb::module_& module);

}  // namespace deep_ep::python
