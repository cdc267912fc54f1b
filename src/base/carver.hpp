#pragma once

#include <cstddef>
#include <cstdint>

#include "base/portable.hpp"

namespace deep_ep {

/// Lays arrays out one behind the other. With a null base it only measures, so that the function
/// which places the parts of a buffer is also the one that computes its size.
class Carver {
 public:
  static constexpr std::int64_t kAlignment = 128;

  DEEP_EP_HD explicit Carver(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <class T>
  DEEP_EP_HD T* take(std::int64_t count) {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ +=
        (count * static_cast<std::int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }

  DEEP_EP_HD std::int64_t used() const { return used_; }

 private:
  std::byte* base_;
  std::int64_t used_ = 0;
};

}  // namespace deep_ep
