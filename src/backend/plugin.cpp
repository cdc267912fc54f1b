#include "backend/plugin.hpp"

#include <dlfcn.h>

#include "base/error.hpp"
#include "deep_ep/version.hpp"

namespace deep_ep {

namespace {

constexpr const char* kLibrary = "libdeep_ep_cuda.so";
using MakeParts = CudaParts* (*)();

CudaParts& load() {
  // Beside this library or program (its run path), then where the system looks.
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("device cuda: {}; build with the CUDA toolkit (preset cuda), or use "
                            "the host device",
                            dlerror()));
  }
  const auto make = reinterpret_cast<MakeParts>(dlsym(library, "deep_ep_cuda_parts"));
  if (make == nullptr) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("device cuda: {} is not of this version ({})", kLibrary, dlerror()));
  }
  return *make();
}

}  // namespace

CudaParts& cuda_parts() {
  static CudaParts& parts = load();
  return parts;
}

}  // namespace deep_ep
