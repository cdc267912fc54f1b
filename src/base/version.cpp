#include "deep_ep/version.hpp"

#define DEEP_EP_TEXT_OF(x) #x
#define DEEP_EP_TEXT(x) DEEP_EP_TEXT_OF(x)

namespace deep_ep {

const char* version() {
  return DEEP_EP_TEXT(DEEP_EP_VERSION_MAJOR) "." DEEP_EP_TEXT(
      DEEP_EP_VERSION_MINOR) "." DEEP_EP_TEXT(DEEP_EP_VERSION_PATCH);
}

}  // namespace deep_ep
