#include "backend/plugin.hpp"

#include "base/plugin.hpp"
#include "deep_ep/error.hpp"

namespace deep_ep {

namespace {

CudaParts& load() {
  using MakeParts = CudaParts* (*)();
  const auto make = reinterpret_cast<MakeParts>(
      load_plugin({.file = "libdeep_ep_cuda.so",
                   .symbol = "deep_ep_cuda_parts",
                   .wanted = "device cuda",
                   .remedy = "build with the CUDA toolkit (preset cuda), or use the host device"}));
  return *make();
}

}  // namespace

CudaParts& cuda_parts() {
  static CudaParts& parts = load();
  return parts;
}

std::string why_no_nvshmem() {
  try {
    return cuda_parts().why_no_nvshmem();
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace deep_ep
