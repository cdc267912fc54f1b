#pragma once

#include <nanobind/nanobind.h>

#include "arrays.hpp"
#include "deep_ep/handle.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// Tensors of a handle, which tell whether it is of several nodes.
constexpr std::size_t kIntranodeTensors = 6;
constexpr std::size_t kInternodeTensors = 10;

/// TypeError unless `handle` is a tuple as dispatch of a Buffer of `num_nodes` returns it.
nb::tuple require_handle(nb::handle handle, int num_nodes);

/// Handles in the order of their structs.
IntranodeHandle intranode_handle_of(const Library& library, const nb::tuple& parts);
/// What calls use of an earlier dispatch's: its channels are for a prepared one. A look at a tensor
/// takes torch as long as any other part of a call.
IntranodeHandle used_of_handle(const Library& library, const nb::tuple& parts);
InternodeHandle internode_handle_of(const Library& library, const nb::tuple& parts);

/// What the caller has of a coming handle: all that was known ahead, a tuple, or its
/// is_token_in_rank.
struct GivenOfHandle {
  nb::handle prepared = nb::none();
  nb::handle is_token_in_rank = nb::none();
};

/// The handle of whichever of a result's two is defined, with the caller's own arrays where it has
/// them; None if neither is. What is undefined of one is None.
nb::object result_of_handle(const Library& library, const IntranodeHandle& handle,
                            const InternodeHandle& internode, const GivenOfHandle& given);

}  // namespace deep_ep::python
