#pragma once

#include <cstdint>

#include "deep_ep/export.hpp"

namespace deep_ep {

/// How much of the machine a high-throughput call may take, and how it chunks its traffic.
/// Ranks may use different values; a handle made with one Config works with any other.
struct DEEP_EP_API Config {
  int num_sms = 20;  ///< SMs (CUDA) or worker threads (host) at most; any value from 1; clipped to
                     ///< what exists
  int num_max_nvl_chunked_send_tokens = 6;  ///< combine: rows written before the receiver is told;
                                            ///< of no effect where rows are read, not written
  int num_max_nvl_chunked_recv_tokens =
      256;  ///< combine: rows in flight from one rank to another at most
  int num_max_rdma_chunked_send_tokens =
      6;  ///< between nodes of hosts, dispatch and combine: rows put before the receiver is told;
          ///< on GPUs each row is told of
  int num_max_rdma_chunked_recv_tokens =
      256;  ///< between nodes of hosts: rows in flight from one rank to another at most; on GPUs
            ///< rings are as long as docs/memory.md says

  /// Throws Error(kInvalidArgument) naming the first field that is out of range: all at least 1,
  /// send <= recv.
  void validate() const;

  /// Bytes to pass as Buffer's num_nvl_bytes for rows of `hidden_bytes` bytes among `num_ranks`
  /// ranks. It is a starting size: control block, combine's inbox and a first block of results;
  /// more is mapped when results need it. Never throws; a value below 1 counts as 1. Multiple of
  /// 128. Formula: docs/memory.md.
  std::int64_t get_nvl_buffer_size_hint(std::int64_t hidden_bytes, int num_ranks) const noexcept;

  /// Bytes to pass as Buffer's num_rdma_bytes for high throughput; 0 while all ranks are of one
  /// node. Nodes are taken to have DEEP_EP_RANKS_PER_NODE ranks, else 8. A Buffer makes less do:
  /// rings hold fewer rows then. Never throws. Multiple of 128. Formula: docs/memory.md.
  std::int64_t get_rdma_buffer_size_hint(std::int64_t hidden_bytes, int num_ranks) const noexcept;
};

}  // namespace deep_ep
