#include "backend/backend.hpp"
#include "backend/plugin.hpp"

namespace deep_ep {

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device.type == DeviceType::kHost) return make_host_backend(options);
  return cuda_parts().make_backend(options);
}

}  // namespace deep_ep
