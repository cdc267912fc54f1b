#pragma once

// The shared library hides every symbol that is not marked with this macro.
#if defined(__GNUC__)
#define DEEP_EP_API __attribute__((visibility("default")))
#else
#define DEEP_EP_API
#endif
