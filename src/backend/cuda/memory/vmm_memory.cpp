#include <cuda.h>

#include <cstring>

#include "backend/cuda/check.hpp"
#include "backend/cuda/memory/memory.hpp"
#include "backend/cuda/memory/zero.hpp"

namespace deep_ep::cuda {

namespace {

/// The driver's functions, found at run time: the library does not link libcuda.
struct Driver {
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) unreserve;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuMemGetAllocationGranularity) granularity;
  decltype(&cuMemExportToShareableHandle) export_handle;
  decltype(&cuMemImportFromShareableHandle) import_handle;
  decltype(&cuDeviceGetAttribute) attribute;
  decltype(&cuGetErrorString) error_string;

  static const Driver& instance() {
    static const Driver driver;
    return driver;
  }

 private:
  Driver() {
    find("cuMemCreate", create);
    find("cuMemRelease", release);
    find("cuMemAddressReserve", reserve);
    find("cuMemAddressFree", unreserve);
    find("cuMemMap", map);
    find("cuMemUnmap", unmap);
    find("cuMemSetAccess", set_access);
    find("cuMemGetAllocationGranularity", granularity);
    find("cuMemExportToShareableHandle", export_handle);
    find("cuMemImportFromShareableHandle", import_handle);
    find("cuDeviceGetAttribute", attribute);
    find("cuGetErrorString", error_string);
  }

  template <class Function>
  static void find(const char* name, Function& function) {
    constexpr unsigned kSince = 12000;
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion(name, &entry, kSince, cudaEnableDefault, &found), name);
    if (found != cudaDriverEntryPointSuccess || entry == nullptr)
      throw Error(ErrorCode::kUnsupported, fmt::format("the CUDA driver has no {}", name));
    function = reinterpret_cast<Function>(entry);
  }
};

void check_driver(CUresult status, const char* call) {
  if (status == CUDA_SUCCESS) return;
  const char* text = "unknown error";
  (void)Driver::instance().error_string(status, &text);
  throw Error(status == CUDA_ERROR_OUT_OF_MEMORY ? ErrorCode::kOutOfMemory : ErrorCode::kSystem,
              fmt::format("{}: {} ({})", call, text, static_cast<int>(status)));
}

/// What a Descriptor's bytes hold.
struct Size {
  std::int64_t bytes;
};

class VmmMapping final : public fabric::Mapping {
 public:
  /// Takes the handle over.
  VmmMapping(CUmemGenericAllocationHandle handle, std::int64_t bytes, int device)
      : handle_(handle), bytes_(bytes), device_(device) {
    const Driver& driver = Driver::instance();
    try {
      check_driver(driver.reserve(&address_, size(), 0, 0, 0), "cuMemAddressReserve");
      check_driver(driver.map(address_, size(), 0, handle_, 0), "cuMemMap");
      mapped_ = true;
      CUmemAccessDesc access{};
      access.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
      access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
      check_driver(driver.set_access(address_, size(), &access, 1), "cuMemSetAccess");
    } catch (...) {
      let_go();
      throw;
    }
  }
  ~VmmMapping() override { let_go(); }

  // An address of the device, never followed here.
  std::byte* base() const override { return reinterpret_cast<std::byte*>(address_); }
  std::int64_t bytes() const override { return bytes_; }
  CUmemGenericAllocationHandle handle() const { return handle_; }

 private:
  std::size_t size() const { return static_cast<std::size_t>(bytes_); }

  // Work that still uses the range ends first: unmapping does not wait for it. Where that cannot be
  // told, since somebody captures a stream or the CUDA context is gone, it stays.
  void let_go() {
    const Driver& driver = Driver::instance();
    if (mapped_) {
      const DeviceGuard guard(device_, std::nothrow);
      if (cudaDeviceSynchronize() != cudaSuccess) return;
      (void)driver.unmap(address_, size());
    }
    if (address_ != 0) (void)driver.unreserve(address_, size());
    (void)driver.release(handle_);
  }

  CUmemGenericAllocationHandle handle_;
  std::int64_t bytes_;
  int device_;
  CUdeviceptr address_ = 0;
  bool mapped_ = false;
};

class VmmMemory final : public fabric::Memory {
 public:
  explicit VmmMemory(int device) : device_(device) {
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    properties_.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    check_driver(Driver::instance().granularity(&granularity_, &properties_,
                                                CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                 "cuMemGetAllocationGranularity");
  }

  std::shared_ptr<fabric::Mapping> allocate(std::int64_t bytes) override {
    require(bytes > 0, "bytes: {} is not allowed, must be positive", bytes);
    const DeviceGuard guard(device_);
    const auto unit = static_cast<std::int64_t>(granularity_);
    bytes = (bytes + unit - 1) / unit * unit;
    CUmemGenericAllocationHandle handle = 0;
    const CUresult status =
        Driver::instance().create(&handle, static_cast<std::size_t>(bytes), &properties_, 0);
    if (status == CUDA_ERROR_OUT_OF_MEMORY) throw_shortage(bytes);
    check_driver(status, "cuMemCreate");
    auto mapping = std::make_shared<VmmMapping>(handle, bytes, device_);
    zero(mapping->base(), static_cast<std::size_t>(bytes));
    return mapping;
  }

  fabric::Descriptor describe(const fabric::Mapping& own) override {
    const auto* mapping = dynamic_cast<const VmmMapping*>(&own);
    require(mapping != nullptr, "own: not memory of this kind");
    const Size size{mapping->bytes()};
    fabric::Descriptor descriptor;
    descriptor.bytes.assign(reinterpret_cast<const char*>(&size), sizeof size);
    check_driver(Driver::instance().export_handle(&descriptor.fd, mapping->handle(),
                                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                 "cuMemExportToShareableHandle");
    return descriptor;
  }

  std::shared_ptr<fabric::Mapping> map(const fabric::Descriptor& descriptor) override {
    Size size{};
    require(descriptor.bytes.size() == sizeof size, "descriptor: {} bytes, must be {}",
            descriptor.bytes.size(), sizeof size);
    std::memcpy(&size, descriptor.bytes.data(), sizeof size);
    require(descriptor.fd >= 0, "descriptor: without a file descriptor (the limit of open files?)");
    const DeviceGuard guard(device_);
    CUmemGenericAllocationHandle handle = 0;
    check_driver(Driver::instance().import_handle(
                     &handle, reinterpret_cast<void*>(static_cast<std::uintptr_t>(descriptor.fd)),
                     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                 "cuMemImportFromShareableHandle");
    return std::make_shared<VmmMapping>(handle, size.bytes, device_);
  }

 private:
  [[noreturn]] static void throw_shortage(std::int64_t bytes) {
    std::size_t left = 0;
    std::size_t total = 0;
    (void)cudaMemGetInfo(&left, &total);
    throw Error(ErrorCode::kOutOfMemory,
                fmt::format("a segment of {} bytes cannot be allocated: the GPU has {} of {} left",
                            bytes, left, total));
  }

  int device_;
  CUmemAllocationProp properties_{};
  std::size_t granularity_ = 0;
};

}  // namespace

std::unique_ptr<fabric::Memory> make_vmm_memory(int device) {
  return std::make_unique<VmmMemory>(device);
}

bool has_vmm(int device) {
  int value = 0;
  const CUresult status = Driver::instance().attribute(
      &value, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device);
  return status == CUDA_SUCCESS && value != 0;
}

}  // namespace deep_ep::cuda
