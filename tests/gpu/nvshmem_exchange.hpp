#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace deep_ep::test {

constexpr std::int64_t kMostBytes = 1 << 20;

/// Every rank's piece of the symmetric heap: signals by sender, then what senders put, then what
/// this rank puts.
struct ExchangeLayout {
  static constexpr std::int64_t kSignalBytes = 4096;
  static std::int64_t bytes(int ranks) { return kSignalBytes + 2 * ranks * kMostBytes; }
};

struct ExchangeReport {
  std::int64_t ns;
  int wrong;  // words that were not what their sender put
  int late;   // signals that did not come in time
};

/// `rounds` rounds from round `first` on, in each of which every rank puts `bytes` bytes to every
/// other and waits for theirs. One block a rank.
cudaError_t launch_exchange(std::byte* base, int rank, int ranks, std::int64_t bytes,
                            std::uint64_t first, int rounds, ExchangeReport* report);

}  // namespace deep_ep::test
