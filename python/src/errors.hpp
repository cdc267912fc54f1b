#pragma once

#include <nanobind/nanobind.h>

#include "references.hpp"

namespace deep_ep::python {

/// `Error`, a RuntimeError, and the translation of the library's exceptions to it.
void bind_errors(nb::module_& module);

}  // namespace deep_ep::python
