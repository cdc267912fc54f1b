#pragma once

#include "deep_ep/types.hpp"

namespace deep_ep {

/// What an EventHandle refers to; each backend has its own. A null state stands for something that
/// is already done.
class EventState {
 public:
  virtual ~EventState() = default;
  virtual void stream_wait(Stream stream) = 0;
  virtual void host_wait() = 0;
  virtual bool query() = 0;
};

}  // namespace deep_ep
