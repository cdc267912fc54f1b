#pragma once

#include <nanobind/nanobind.h>

#include "references.hpp"

namespace deep_ep::python {

/// `Buffer`, whose methods deep_ep/buffer.py calls by position, and the size hints.
void bind_buffers(nb::module_& module);

}  // namespace deep_ep::python
