#pragma once

#include <nanobind/nanobind.h>

#include "deep_ep/tensor.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// Whether a type of arrays has DLPack's exchange interface (1.3), as torch's from 2.10 on, which
/// tells all of an array in one call.
bool has_exchange(nb::handle type);

/// The view of an array of such a type. TypeError for a dtype that no call takes.
TensorView exchanged_view(nb::handle array);

}  // namespace deep_ep::python
