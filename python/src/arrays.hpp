#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "deep_ep/tensor.hpp"
#include "exchange.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// The deleter of memory that a Python object owns, the object that allocate() of an allocator
/// gave.
struct ObjectOwner {
  Reference object;
  void operator()(void*) const {}
};

/// What a caller reads of statistics that are no array.
constexpr const char* kWaitStats = "wait_recv_cost_stats";

/// Whose arrays a call takes and returns: one of the libraries of deep_ep/_arrays.py.
class Library {
 public:
  /// `type`: of its arrays. `view(array, name, is_output)` and `make(result, dtype)` do what is
  /// not done here: the first returns (address, dtype, shape, strides in elements, CUDA device or
  /// -1) or raises a TypeError or ValueError that names the argument, the second takes an Array, or
  /// (owner, offset in bytes, shape, strides in elements) in memory of an ObjectOwner, and the
  /// number of its DType. `typed(array, dtype)` gives bytes the type of elements that they are of.
  Library(nb::type_object type, nb::callable view, nb::callable make, nb::callable typed);

  /// Of None undefined.
  TensorView view(nb::handle array, const char* name) const { return view(array, name, false); }
  /// The same of an array that the call writes to.
  TensorView output(nb::handle array, const char* name) const { return view(array, name, true); }
  /// Of an undefined result None.
  nb::object make(const Tensor& tensor) const;
  /// Elements as those of `like`, which may be of a type that DType does not have.
  nb::object make_like(const Tensor& tensor, nb::handle like) const;

 private:
  TensorView view(nb::handle array, const char* name, bool is_output) const;

  nb::type_object type_;
  const Exchange* exchange_;
  nb::callable view_;
  nb::callable make_;
  nb::callable typed_;
};

bool is_tuple_of(nb::handle value, std::size_t size);
/// The TypeError for one that is none: "`name` is ..., must be `expected`".
nb::builtin_exception wrong_tuple(const char* name, nb::handle value, const std::string& expected);

void bind_arrays(nb::module_& module);

}  // namespace deep_ep::python
