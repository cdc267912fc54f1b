#pragma once

#include <cstdint>

namespace deep_ep::verify {

/// SplitMix64's finaliser: the same numbers with every compiler and standard library.
constexpr std::uint64_t mix(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

/// A key that depends on every part and on their order.
template <class... Parts>
constexpr std::uint64_t make_key(std::uint64_t seed, Parts... parts) {
  std::uint64_t key = mix(seed);
  ((key = mix(key ^ static_cast<std::uint64_t>(parts))), ...);
  return key;
}

class Random {
 public:
  explicit Random(std::uint64_t key) : state_(key) {}

  std::uint64_t next() { return mix(state_++); }
  /// In [0, bound).
  std::int64_t below(std::int64_t bound) {
    return static_cast<std::int64_t>((next() >> 32) * static_cast<std::uint64_t>(bound) >> 32);
  }
  /// In (0, 1].
  double unit() { return (static_cast<double>(next() >> 11) + 1) * 0x1p-53; }

 private:
  std::uint64_t state_;
};

}  // namespace deep_ep::verify
