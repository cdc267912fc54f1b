#pragma once

#if defined(DEEP_EP_HAS_NVTX)
#include <nvtx3/nvtx3.hpp>
#endif

namespace deep_ep {

/// A range in the NVTX domain "deep_ep" for the life of the object; nothing in builds without CUDA.
class NvtxRange {
 public:
#if defined(DEEP_EP_HAS_NVTX)
  explicit NvtxRange(const char* name) : range_(name) {}

 private:
  struct Domain {
    static constexpr char const* name{"deep_ep"};
  };
  nvtx3::scoped_range_in<Domain> range_;
#else
  explicit NvtxRange(const char*) {}
#endif
};

}  // namespace deep_ep
