#pragma once

#include <nanobind/nanobind.h>

#include "deep_ep/tensor.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// The deleter of memory that a Python object owns, the object that allocate() of an allocator
/// gave.
struct ObjectOwner {
  Reference object;
  void operator()(void*) const {}
};

/// None, an array whose type speaks DLPack's exchange interface, or what deep_ep/_arrays.py makes
/// of another: (address, dtype, shape, strides in elements, CUDA device or -1).
TensorView view_of(nb::handle array);

/// What becomes of a result: None if undefined; (owner, offset in bytes, shape, strides in
/// elements or None if contiguous) in memory of an ObjectOwner; else an Array.
nb::object result_of(const Tensor& tensor);

void bind_arrays(nb::module_& module);

}  // namespace deep_ep::python
