#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "allocator.hpp"
#include "arrays.hpp"
#include "bootstraps.hpp"
#include "buffers.hpp"
#include "deep_ep/types.hpp"
#include "deep_ep/version.hpp"
#include "errors.hpp"
#include "events.hpp"

/// The part of the Python package that is not Python: values in, values out, no tensor types. What
/// users see is in python/deep_ep.
NB_MODULE(_C, module) {
  using namespace deep_ep::python;
  // The interpreter ends before the objects of other modules let go of ours.
  nb::set_leak_warnings(false);
  bind_errors(module);
  bind_arrays(module);
  bind_allocator(module);
  bind_events(module);
  bind_bootstraps(module);
  bind_buffers(module);
  module.attr("__version__") = deep_ep::version();
  module.def("num_cuda_devices", [] { return deep_ep::num_devices(deep_ep::DeviceType::kCuda); });
  module.def("has_cuda_parts", [] { return deep_ep::has_parts(deep_ep::DeviceType::kCuda); });
  module.def("describe_cuda_devices",
             [] { return deep_ep::describe_devices(deep_ep::DeviceType::kCuda); });
}
