#include "names.hpp"

#include <array>
#include <string>
#include <utility>

#include "base/error.hpp"

namespace deep_ep::cli {
namespace {

constexpr std::array<std::pair<DType, const char*>, 5> kNames{{{DType::kBfloat16, "bf16"},
                                                               {DType::kFloat16, "fp16"},
                                                               {DType::kFloat32, "fp32"},
                                                               {DType::kFloat8E4m3, "fp8"},
                                                               {DType::kUint8, "bytes"}}};

}  // namespace

DType dtype_from(std::string_view name) {
  std::string allowed;
  for (const auto& [dtype, known] : kNames) {
    if (name == known) return dtype;
    allowed += (allowed.empty() ? "" : ", ") + std::string(known);
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("dtype '{}' is unknown; allowed: {}", name, allowed));
}

const char* short_name(DType dtype) {
  for (const auto& [known, name] : kNames)
    if (known == dtype) return name;
  return to_string(dtype);
}

Device device_from(std::string_view backend, int rank) {
  if (backend == "host") return {};
  require(backend == "cuda", "backend '{}' is unknown; allowed: {}", backend, kBackends);
  const int gpus = num_devices(DeviceType::kCuda);
  if (gpus == 0) {
    throw Error(ErrorCode::kUnsupported,
                "--backend cuda: no GPU, no driver, or no CUDA parts of the library "
                "(DEEP_EP_LOG_LEVEL=debug says which)");
  }
  return {DeviceType::kCuda, rank % gpus};
}

DType combine_dtype_for(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kFloat32 ? dtype : DType::kBfloat16;
}

}  // namespace deep_ep::cli
