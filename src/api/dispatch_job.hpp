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
  // Each job has a constructor of its own: without one make_shared fills all of it, which is 10 KB,
  // with zeros before its members are made.
  explicit AnyDispatchJob(const DispatchArgs& given) : args(given) {}

  DispatchArgs args;
  std::uint64_t number = 0;                       // in the log
  std::optional<internode::LayoutParams> layout;  // if the call has to find it
  std::int64_t num_recv_rows = 0;
  std::vector<std::int64_t> tokens_per_expert;  // received, of the local experts
  Backend::Results block;
  intranode::GroupParams group;  // with group_rows
  DispatchResult result;
};

struct Buffer::Impl::DispatchJob : AnyDispatchJob {
  using AnyDispatchJob::AnyDispatchJob;

  intranode::NotifyDispatchParams notify;
  intranode::DispatchParams dispatch;
};

struct Buffer::Impl::InternodeDispatchJob : AnyDispatchJob {
  using AnyDispatchJob::AnyDispatchJob;

  internode::NotifyDispatchParams notify;
  internode::DispatchParams dispatch;
  std::int64_t num_recv_records = 0;
};

/// One combine likewise.
struct Buffer::Impl::AnyCombineJob {
  explicit AnyCombineJob(const CombineArgs& given) : args(given) {}

  CombineArgs args;
  intranode::ReduceParams reduce;  // if the rows are grouped
  Backend::Results reduced;
  CombineResult result;
};

struct Buffer::Impl::CombineJob : AnyCombineJob {
  using AnyCombineJob::AnyCombineJob;

  intranode::CombineParams params;
};

struct Buffer::Impl::InternodeCombineJob : AnyCombineJob {
  using AnyCombineJob::AnyCombineJob;

  internode::CombineParams params;
};

/// How many rows came, by a handle: a number of the device.
inline const std::int32_t* num_received_rows(const IntranodeHandle& handle, int rank) {
  const std::int64_t ranks = handle.rank_prefix_matrix.shape[0];
  return handle.rank_prefix_matrix.as<const std::int32_t>() + (ranks - 1) * ranks + rank;
}
inline const std::int32_t* num_received_rows(const InternodeHandle& handle) {
  const Tensor& sums = handle.recv_gbl_rank_prefix_sum;
  return sums.as<const std::int32_t>() + sums.shape[0] - 1;
}

/// Channels of the handle of a dispatch.
int num_channels(const Config& config);

}  // namespace deep_ep
