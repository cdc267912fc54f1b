#pragma once

#include <nanobind/nanobind.h>

#include "deep_ep/handle.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// Tensors of a handle, which tell whether it is of several nodes.
constexpr std::size_t kIntranodeTensors = 6;
constexpr std::size_t kInternodeTensors = 10;

/// Handles in the order of their structs.
IntranodeHandle intranode_handle_of(const nb::tuple& parts);
InternodeHandle internode_handle_of(const nb::tuple& parts);

/// None if neither of a result's two is defined. What is undefined of one is None.
nb::object result_of_handle(const IntranodeHandle& handle, const InternodeHandle& internode);

}  // namespace deep_ep::python
