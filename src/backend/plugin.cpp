#include "backend/plugin.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <string>

#include "base/error.hpp"
#include "deep_ep/version.hpp"

namespace deep_ep {

namespace {

/// The reason of this thread's last failure.
std::string reason() {
  const char* text = dlerror();  // NOLINT(concurrency-mt-unsafe): glibc keeps it for each thread
  return text == nullptr ? "no reason given" : text;
}

constexpr const char* kLibrary = "libdeep_ep_cuda.so";
using MakeParts = CudaParts* (*)();

/// The folder of the library or program that this code is part of, with a slash.
std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0) return "";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

CudaParts& load() {
  // Beside this library, in lib/ beside the folder of this program, or where the system looks.
  void* library = nullptr;
  std::string why;
  for (const std::string& folder : {own_folder(), own_folder() + "../lib/", std::string()}) {
    library = dlopen((folder + kLibrary).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    // Of a file that is there but cannot be loaded the reason counts.
    const std::string this_time = reason();
    if (why.empty() || access((folder + kLibrary).c_str(), F_OK) == 0) why = this_time;
  }
  if (library == nullptr) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("device cuda: {}; build with the CUDA toolkit (preset cuda), or use "
                            "the host device",
                            why));
  }
  const auto make = reinterpret_cast<MakeParts>(dlsym(library, "deep_ep_cuda_parts"));
  if (make == nullptr) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("device cuda: {} is not of this version ({})", kLibrary, reason()));
  }
  return *make();
}

}  // namespace

CudaParts& cuda_parts() {
  static CudaParts& parts = load();
  return parts;
}

}  // namespace deep_ep
