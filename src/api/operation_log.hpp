#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string>

#include "protocol/control.hpp"

namespace deep_ep {

/// The last operations of a Buffer, for the post-mortem. Thread-safe.
class OperationLog {
 public:
  static constexpr std::uint64_t kSize = 256;

  /// Returns the operation's number. `name` must live for ever.
  std::uint64_t begin(const char* name, std::uint64_t epoch, const protocol::CallRecord& record);
  void finish(std::uint64_t number, const char* state);
  /// What call `number` is, for texts.
  const char* name(std::uint64_t number) const;
  /// Oldest first.
  std::string to_json() const;

 private:
  struct Entry {
    std::uint64_t number;
    const char* name;
    std::uint64_t epoch;
    protocol::CallRecord record;
    const char* state;
    std::int64_t begin_ns;
    std::int64_t end_ns;
  };

  mutable std::mutex mutex_;
  std::array<Entry, kSize> entries_{};
  std::uint64_t next_ = 0;
};

}  // namespace deep_ep
