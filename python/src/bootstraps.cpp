#include "bootstraps.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "deep_ep/bootstrap.hpp"

namespace deep_ep::python {

namespace {

nb::list to_list(const std::vector<std::string>& all) {
  nb::list list;
  for (const std::string& one : all) list.append(nb::bytes(one.data(), one.size()));
  return list;
}

/// `all_gather` takes bytes and returns a sequence of bytes. What it raises leaves the call that
/// needed it as it is.
std::shared_ptr<Bootstrap> make_callback(int rank, int size, nb::object all_gather) {
  const auto gather = [call = Reference(std::move(all_gather))](std::string_view mine) {
    const nb::gil_scoped_acquire gil;
    std::vector<std::string> all;
    for (const nb::handle one : call.get()(nb::bytes(mine.data(), mine.size()))) {
      const auto bytes = nb::cast<nb::bytes>(one);
      all.emplace_back(bytes.c_str(), bytes.size());
    }
    return all;
  };
  return bootstrap_callback(rank, size, gather);
}

}  // namespace

void bind_bootstraps(nb::module_& module) {
  nb::class_<Bootstrap>(module, "Bootstrap")
      .def("rank", &Bootstrap::rank)
      .def("size", &Bootstrap::size)
      .def("all_gather", [](Bootstrap& bootstrap, const nb::bytes& mine) {
        const std::string_view view(mine.c_str(), mine.size());
        std::vector<std::string> all;
        {
          const nb::gil_scoped_release no_gil;
          all = bootstrap.all_gather(view);
        }
        return to_list(all);
      });
  module.def("bootstrap_callback", &make_callback);
  module.def("bootstrap_from_environment", &bootstrap_from_environment,
             nb::call_guard<nb::gil_scoped_release>());
  module.def(
      "bootstrap_tcp",
      [](int rank, int size, const std::string& address, int port, std::int64_t timeout_ms) {
        return bootstrap_tcp(rank, size, address, port, std::chrono::milliseconds(timeout_ms));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace deep_ep::python
