#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "api/buffer_impl.hpp"
#include "modes/internode.hpp"
#include "modes/intranode.hpp"

namespace deep_ep {

/// One dispatch from validation to its event: everything that its stages use, kept alive by them.
struct Buffer::Impl::AnyDispatchJob {
  DispatchArgs args;
  std::uint64_t number = 0;                       // in the log
  std::optional<internode::LayoutParams> layout;  // if the call has to find it
  std::int64_t num_recv_rows = 0;
  std::vector<std::int64_t> tokens_per_expert;  // received, of the local experts
  Backend::Results block;
  DispatchResult result;
};

struct Buffer::Impl::DispatchJob : AnyDispatchJob {
  intranode::NotifyDispatchParams notify;
  intranode::DispatchParams dispatch;
  intranode::GroupParams group;
};

struct Buffer::Impl::InternodeDispatchJob : AnyDispatchJob {
  internode::NotifyDispatchParams notify;
  internode::DispatchParams dispatch;
  std::int64_t num_recv_records = 0;
};

/// Channels of the handle of a dispatch.
int num_channels(const Config& config);

}  // namespace deep_ep
