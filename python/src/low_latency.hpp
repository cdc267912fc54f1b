#pragma once

#include <nanobind/nanobind.h>

#include "owned_buffer.hpp"

namespace deep_ep::python {

/// The low-latency methods of `Buffer`.
void bind_low_latency(nb::module_& module, nb::class_<OwnedBuffer>& buffer);

}  // namespace deep_ep::python
