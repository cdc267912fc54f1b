#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <type_traits>

#include "references.hpp"

namespace deep_ep::python {

/// `value` as a bool or an integer; a TypeError that names the argument if it is none, or too
/// large.
template <class T>
T scalar_of(nb::handle value, const char* name) {
  constexpr bool kIsFlag = std::is_same_v<T, bool>;
  T scalar{};
  // What has no __index__ may be a float or a text, which nanobind would turn into a number.
  if ((kIsFlag || PyIndex_Check(value.ptr()) != 0) && nb::try_cast<T>(value, scalar)) return scalar;
  const std::string wanted =
      kIsFlag ? "True or False" : "an int of " + std::to_string(8 * sizeof(T)) + " bits";
  throw nb::type_error(
      (name + (" is " + std::string(nb::repr(value).c_str())) + ", must be " + wanted).c_str());
}

}  // namespace deep_ep::python
