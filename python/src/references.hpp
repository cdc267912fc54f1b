#pragma once

#include <nanobind/nanobind.h>

#include <memory>

namespace deep_ep::python {

namespace nb = nanobind;

/// A Python object that C++ holds, also on threads that Python does not know: whoever lets the last
/// copy go takes the GIL for it. Behind the interpreter's end the object is left alone.
class Reference {
 public:
  explicit Reference(nb::object object)
      : object_(object.release().ptr(), [](PyObject* held) {
          if (!nb::is_alive()) return;
          const nb::gil_scoped_acquire gil;
          Py_DECREF(held);
        }) {}

  nb::handle get() const { return object_.get(); }

 private:
  std::shared_ptr<PyObject> object_;
};

}  // namespace deep_ep::python
