#pragma once

#include <nanobind/nanobind.h>

#include "references.hpp"

namespace deep_ep::python {

/// `Bootstrap` and what makes one.
void bind_bootstraps(nb::module_& module);

}  // namespace deep_ep::python
