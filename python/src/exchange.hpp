#pragma once

#include <nanobind/nanobind.h>

#include "deep_ep/tensor.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// DLPack's exchange interface (1.3), as torch's tensors have it from 2.10 on, which tells all of
/// an array in one call.
struct Exchange;

/// Null if arrays of `type` have none.
const Exchange* find_exchange(nb::handle type);

/// The view of an array of such a type. TypeError for a dtype that no call takes.
TensorView exchanged_view(const Exchange& exchange, nb::handle array);

}  // namespace deep_ep::python
