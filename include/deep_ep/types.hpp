#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "deep_ep/export.hpp"

namespace deep_ep {

/// Element types that a call accepts somewhere. Which one is allowed where is said at each
/// argument.
enum class DType : std::uint8_t {
  kUint8 = 0,       ///< opaque bytes; dispatch moves them untouched
  kBool = 1,        ///< one byte, 0 or 1
  kInt32 = 2,       ///< counts, expert ids, packed UE8M0 scales
  kInt64 = 3,       ///< expert ids
  kFloat32 = 4,     ///< payload, weights, scales
  kFloat16 = 5,     ///< payload
  kBfloat16 = 6,    ///< payload
  kFloat8E4m3 = 7,  ///< payload; usually with scales
};

/// Bytes of one element.
DEEP_EP_API std::size_t size_of(DType dtype);

/// The name in lower case, e.g. "bfloat16".
DEEP_EP_API const char* to_string(DType dtype);

enum class DeviceType : std::uint8_t { kHost = 0, kCuda = 1 };

/// Where memory lies and which backend works on it.
struct Device {
  DeviceType type = DeviceType::kHost;
  int index = 0;  ///< CUDA device ordinal; 0 on the host

  friend bool operator==(const Device&, const Device&) = default;
};

DEEP_EP_API const char* to_string(DeviceType type);

/// Devices of a type that this process can use: 1 for the host, the GPUs it sees for CUDA, 0
/// without the CUDA parts of this library or without a driver. Never throws.
DEEP_EP_API int num_devices(DeviceType type) noexcept;

/// Whether this library has its parts for devices of a type, found and loadable, be there devices
/// or not. Never throws; loads the parts, and asks no driver.
DEEP_EP_API bool has_parts(DeviceType type) noexcept;

/// For people: a line for each device, and one for each pair of GPUs that says whether their ranks
/// can exchange, and if not why; or one line that says why there are none. Never throws.
DEEP_EP_API std::vector<std::string> describe_devices(DeviceType type) noexcept;

/// A caller's execution stream. `native` is a cudaStream_t on CUDA devices, passed verbatim.
/// On the host the stream is the calling thread and `native` is ignored.
struct Stream {
  void* native = nullptr;
  Device device{};  ///< whose stream it is; calls of a Buffer take their Buffer's device instead
};

}  // namespace deep_ep
