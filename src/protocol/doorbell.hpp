#pragma once

#include <cstdint>

#include "protocol/atomic.hpp"

namespace deep_ep::protocol {

/// Wakes a rank that sleeps. One in each rank's control block; whoever publishes something to the
/// rank rings it afterwards.
///
/// No wake-up is lost: all accesses below are sequentially consistent. The sleeper counts itself,
/// reads `rung`, looks at its flags once more, and sleeps only if `rung` is unchanged. The ringer
/// adds to `rung`, then reads `sleepers`. If the sleeper's read of `rung` missed the ring, the
/// ringer's read of `sleepers` sees the sleeper and wakes it; if it did not miss it, the flags
/// published before the ring are visible to the second look. (`rung` wraps after 2^32 rings; should
/// exactly so many fall between the sleeper's read and its sleep, the sleep's time limit ends it.)
struct alignas(128) Doorbell {
  std::uint32_t rung;
  std::uint32_t sleepers;

  void ring();
  /// Sleeps until the doorbell is rung, at most `ns`. `ready` is the second look; returns whether
  /// it was true.
  template <class Ready>
  bool sleep(std::int64_t ns, Ready&& ready) {
    const Sleeper counted(*this);
    const std::uint32_t before = load_seq_cst(&rung);
    if (ready()) return true;
    futex_wait(before, ns);
    return false;
  }

 private:
  // Counts down also when `ready` throws: a sleeper too many costs every ring a system call.
  struct Sleeper {
    explicit Sleeper(Doorbell& own) : bell(own) { add_seq_cst(&bell.sleepers, std::uint32_t{1}); }
    ~Sleeper() { add_seq_cst(&bell.sleepers, ~std::uint32_t{0}); }
    Doorbell& bell;
  };
  void futex_wait(std::uint32_t expected, std::int64_t ns);
};

}  // namespace deep_ep::protocol
