#pragma once

#include <bit>
#include <cstdint>

#include "base/portable.hpp"

// The arithmetic of the library, written out once: every backend and the reference give the same
// bits. docs/numerics.md explains the choices.
namespace deep_ep::plan {

struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

/// Exact.
DEEP_EP_HD inline float to_float(float value) { return value; }
DEEP_EP_HD float to_float(Bfloat16 value);
DEEP_EP_HD float to_float(Float16 value);

/// Round to nearest, ties to even; overflow to infinity; every NaN becomes the canonical one
/// (0x7fff), as CUDA's conversions do.
template <class T>
DEEP_EP_HD T from_float(float value);

}  // namespace deep_ep::plan
