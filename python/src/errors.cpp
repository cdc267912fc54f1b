#include "errors.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "deep_ep/error.hpp"

namespace deep_ep::python {

namespace {

void translate(const std::exception_ptr& thrown, void* type) {
  try {
    std::rethrow_exception(thrown);
  } catch (const Error& error) {
    const nb::object raised = nb::borrow(static_cast<PyObject*>(type))(error.what());
    raised.attr("code") = to_string(error.code());
    raised.attr("ranks") = nb::cast(error.ranks());
    PyErr_SetObject(static_cast<PyObject*>(type), raised.ptr());
  }
}

}  // namespace

void bind_errors(nb::module_& module) {
  PyObject* type = PyErr_NewExceptionWithDoc(
      "deep_ep.Error",
      "What a call of the library failed with. `code` says what kind it is (\"timeout\", ...), "
      "`ranks` which ranks are to blame; the text names the argument, its value and what is "
      "allowed.",
      PyExc_RuntimeError, nullptr);
  if (type == nullptr) throw nb::python_error();
  module.attr("Error") = nb::steal(type);
  nb::register_exception_translator(&translate, type);
}

}  // namespace deep_ep::python
