#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "deep_ep/deep_ep.hpp"

namespace deep_ep::test {

/// Results of small dispatches that stay live while many other calls run, and across the end of
/// their Buffer. What they must hold is known by formula.
class Keepsakes {
 public:
  /// Collective: dispatches a few rows and keeps the result; the oldest one goes when there are
  /// more than a few.
  void take(Buffer& buffer);
  /// Collective: brings the rows of the oldest keepsake of `buffer` home and checks the sums.
  /// Returns what is wrong, or "".
  std::string combine_oldest(Buffer& buffer);
  /// What is wrong with any of the kept results, or "".
  std::string check() const;
  /// The Buffer goes: its results can still be checked, but combined no more.
  void forget_buffer(const Buffer& buffer);

 private:
  struct Keepsake {
    const Buffer* buffer;
    int rank;
    int num_ranks;
    std::uint64_t number;
    DispatchResult result;
  };

  std::map<int, std::uint64_t> taken_;  // by number of ranks, so that these agree on it
  std::vector<Keepsake> kept_;
};

}  // namespace deep_ep::test
