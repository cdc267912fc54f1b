#include "backend/backend.hpp"
#include "backend/plugin.hpp"
#include "base/error.hpp"

namespace deep_ep {

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device.type == DeviceType::kHost) return make_host_backend(options);
  if (options.topology.num_nodes() > 1) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("device cuda: the {} ranks are of {} nodes of {}, and GPUs exchange "
                            "within one node only: what is missing is a symmetric heap of GPU "
                            "memory (NVSHMEM), which this version cannot use",
                            options.num_ranks, options.topology.num_nodes(),
                            options.topology.ranks_per_node));
  }
  return cuda_parts().make_backend(options);
}

}  // namespace deep_ep
