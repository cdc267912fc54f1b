#pragma once

#include <memory>

#include "deep_ep/types.hpp"

namespace deep_ep {

/// The deleter of a Tensor's owner whose memory goes back to a heap only behind work on streams:
/// Tensor::release(stream) finds it and names a stream.
class ReleaseHook {
 public:
  class Target {
   public:
    virtual ~Target() = default;
    /// The memory goes back behind the work that `stream` has by then, too.
    virtual void add_stream(Stream stream) = 0;
    /// The last owner is gone. Must not throw.
    virtual void release() noexcept = 0;
  };

  explicit ReleaseHook(std::shared_ptr<Target> target) : target_(std::move(target)) {}
  void operator()(void*) const noexcept { target_->release(); }
  void add_stream(Stream stream) const { target_->add_stream(stream); }

 private:
  std::shared_ptr<Target> target_;
};

}  // namespace deep_ep
