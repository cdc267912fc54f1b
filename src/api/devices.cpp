#include "backend/plugin.hpp"
#include "base/log.hpp"
#include "deep_ep/error.hpp"
#include "deep_ep/types.hpp"

namespace deep_ep {

int num_devices(DeviceType type) noexcept {
  if (type == DeviceType::kHost) return 1;
  try {
    return cuda_parts().num_devices();
  } catch (const Error& error) {
    log::debug("no CUDA devices: {}", error.what());
    return 0;
  }
}

bool has_parts(DeviceType type) noexcept {
  if (type == DeviceType::kHost) return true;
  try {
    (void)cuda_parts();
    return true;
  } catch (const Error& error) {
    log::debug("no CUDA parts: {}", error.what());
    return false;
  }
}

std::vector<std::string> describe_devices(DeviceType type) noexcept {
  if (type == DeviceType::kHost) return {"host: the CPU"};
  try {
    return cuda_parts().describe();
  } catch (const std::exception& error) {
    return {error.what()};
  }
}

}  // namespace deep_ep
