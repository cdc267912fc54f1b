#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "api/buffer_impl.hpp"
#include "modes/internode.hpp"
#include "modes/intranode.hpp"

namespace deep_ep {

/// One dispatch from validation to its event: everything that its stages use, kept alive by them.
struct Buffer::Impl::DispatchJob {
  DispatchArgs args;
  std::uint64_t number = 0;                       // in the log
  std::optional<internode::LayoutParams> layout;  // if the call has to find it
  intranode::NotifyDispatchParams notify;
  intranode::DispatchParams dispatch;
  intranode::GroupParams group;
  std::int64_t num_recv_rows = 0;
  std::vector<std::int64_t> tokens_per_expert;  // received, of the local experts
  Backend::Results block;
  DispatchResult result;
};

}  // namespace deep_ep
