#pragma once

#include "deep_ep/export.hpp"

// CMakeLists.txt reads the version from here. MAJOR is the soname, MAJOR.MINOR while MAJOR is 0.
#define DEEP_EP_VERSION_MAJOR 0
#define DEEP_EP_VERSION_MINOR 1
#define DEEP_EP_VERSION_PATCH 0

namespace deep_ep {

/// The version of the library that is loaded, e.g. "0.1.0".
DEEP_EP_API const char* version();

}  // namespace deep_ep
