#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>

#include "backend/cuda/check.hpp"
#include "backend/cuda/memory/memory.hpp"
#include "backend/cuda/memory/zero.hpp"
#include "fabric/socket.hpp"

namespace deep_ep::cuda {

namespace {

/// What a Descriptor's bytes hold.
struct Handle {
  cudaIpcMemHandle_t ipc;
  char id[16];  // random: a process cannot open its own handle, but finds the memory by this
  std::int64_t bytes;
};

class IpcMapping final : public fabric::Mapping {
 public:
  enum class Origin { kAllocated, kOpened };
  IpcMapping(void* base, std::int64_t bytes, Origin origin, int device, std::string id)
      : base_(base), bytes_(bytes), origin_(origin), device_(device), id_(std::move(id)) {}
  ~IpcMapping() override {
    const DeviceGuard guard(device_, std::nothrow);
    // Work that still uses it ends first. Where that cannot be told, since somebody captures a
    // stream or the CUDA context is gone, it stays.
    if (cudaDeviceSynchronize() != cudaSuccess) return;
    (void)(origin_ == Origin::kOpened ? cudaIpcCloseMemHandle(base_) : cudaFree(base_));
  }
  std::byte* base() const override { return static_cast<std::byte*>(base_); }
  std::int64_t bytes() const override { return bytes_; }
  const std::string& id() const { return id_; }
  /// For a rank that is another thread of this process.
  void allow_access_from(int device) const {
    if (device == device_) return;
    const DeviceGuard guard(device);
    const cudaError_t status = cudaDeviceEnablePeerAccess(device_, 0);
    if (status == cudaErrorPeerAccessAlreadyEnabled) {
      (void)cudaGetLastError();
      return;
    }
    check(status, "cudaDeviceEnablePeerAccess");
  }

 private:
  void* base_;
  std::int64_t bytes_;
  Origin origin_;
  int device_;
  std::string id_;
};

/// What this process allocated, for ranks that are its threads.
struct Registry {
  std::mutex mutex;
  std::map<std::string, std::weak_ptr<IpcMapping>> mappings;

  static Registry& instance() {
    static auto* registry = new Registry;  // results may outlive main()
    return *registry;
  }
};

class IpcMemory final : public fabric::Memory {
 public:
  explicit IpcMemory(int device) : device_(device) {}

  std::shared_ptr<fabric::Mapping> allocate(std::int64_t bytes) override {
    require(bytes > 0, "bytes: {} is not allowed, must be positive", bytes);
    const DeviceGuard guard(device_);
    // Whole allocations: a handle opens the allocation that a pointer lies in, from its beginning.
    constexpr std::int64_t kUnit = 2 << 20;
    bytes = (bytes + kUnit - 1) / kUnit * kUnit;
    void* base = nullptr;
    check(cudaMalloc(&base, static_cast<std::size_t>(bytes)), "cudaMalloc of a segment");
    auto mapping = std::make_shared<IpcMapping>(base, bytes, IpcMapping::Origin::kAllocated,
                                                device_, fabric::random_bytes(sizeof(Handle::id)));
    zero(mapping->base(), static_cast<std::size_t>(bytes));
    Registry& registry = Registry::instance();
    const std::lock_guard lock(registry.mutex);
    std::erase_if(registry.mappings, [](const auto& entry) { return entry.second.expired(); });
    registry.mappings[mapping->id()] = mapping;
    return mapping;
  }

  fabric::Descriptor describe(const fabric::Mapping& own) override {
    const auto* mapping = dynamic_cast<const IpcMapping*>(&own);
    require(mapping != nullptr, "own: not memory of this kind");
    const DeviceGuard guard(device_);
    Handle handle{};
    check(cudaIpcGetMemHandle(&handle.ipc, mapping->base()), "cudaIpcGetMemHandle");
    std::memcpy(handle.id, mapping->id().data(), sizeof handle.id);
    handle.bytes = mapping->bytes();
    return {std::string(reinterpret_cast<const char*>(&handle), sizeof handle), -1};
  }

  std::shared_ptr<fabric::Mapping> map(const fabric::Descriptor& descriptor) override {
    Handle handle{};
    require(descriptor.bytes.size() == sizeof handle, "descriptor: {} bytes, must be {}",
            descriptor.bytes.size(), sizeof handle);
    std::memcpy(&handle, descriptor.bytes.data(), sizeof handle);
    const std::string id(handle.id, sizeof handle.id);
    {
      Registry& registry = Registry::instance();
      const std::lock_guard lock(registry.mutex);
      const auto entry = registry.mappings.find(id);
      if (entry != registry.mappings.end()) {
        if (auto own = entry->second.lock()) {
          own->allow_access_from(device_);
          return own;
        }
      }
    }
    const DeviceGuard guard(device_);
    void* base = nullptr;
    check(cudaIpcOpenMemHandle(&base, handle.ipc, cudaIpcMemLazyEnablePeerAccess),
          "cudaIpcOpenMemHandle");
    return std::make_shared<IpcMapping>(base, handle.bytes, IpcMapping::Origin::kOpened, device_,
                                        id);
  }

 private:
  int device_;
};

}  // namespace

std::unique_ptr<fabric::Memory> make_ipc_memory(int device) {
  return std::make_unique<IpcMemory>(device);
}

}  // namespace deep_ep::cuda
