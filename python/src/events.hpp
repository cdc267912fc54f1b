#pragma once

#include <nanobind/nanobind.h>

#include "deep_ep/handle.hpp"
#include "owned_buffer.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// A stream of CUDA device `device`, or the calling thread with -1.
Stream stream_of(std::uintptr_t native, int device);

/// (stream, CUDA device or -1, previous EventHandle or None, async_finish,
/// allocate_on_comm_stream), or () of a synchronous call behind what the current stream has: most
/// are.
CallOptions options_of(const OwnedBuffer& buffer, const nb::tuple& parts);

/// The event of a call for Python: None unless it is asynchronous.
nb::object event_of(const CallOptions& options, const EventHandle& event);

void bind_events(nb::module_& module);

}  // namespace deep_ep::python
