#include "backend/backend.hpp"
#include "base/error.hpp"

namespace deep_ep {

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device.type == DeviceType::kHost) return make_host_backend(options);
  throw Error(ErrorCode::kUnsupported,
              "device cuda: this build has the host backend only; pass Device{DeviceType::kHost}");
}

}  // namespace deep_ep
