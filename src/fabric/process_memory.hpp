#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "fabric/socket.hpp"

namespace deep_ep::fabric {

/// By which another process of this machine finds out whether it can read this one's memory: random
/// words and where they lie. The object stays where it is for as long as anybody may try.
class Beacon {
 public:
  static constexpr int kWords = 2;
  /// Plain data, for the others.
  struct Sight {
    std::int64_t pid;
    std::uint64_t address;
    std::array<std::uint64_t, kWords> words;
  };

  Beacon();
  Beacon(const Beacon&) = delete;
  Beacon& operator=(const Beacon&) = delete;

  Sight sight() const;

 private:
  std::array<std::uint64_t, kWords> words_;
};

/// Ordinary memory of another process (or of this one: a rank on another thread), read with one
/// copy by the kernel (process_vm_readv). Needs what ptrace needs: the same user and pid namespace,
/// and no Yama or seccomp in the way; so it is tried.
class ProcessMemory {
 public:
  ProcessMemory() = default;
  /// Opens the process that showed `sight`. Returns why its memory cannot be read; empty: it can.
  std::string open(const Beacon::Sight& sight);

  /// True if it is this very process: its addresses can be used as they are.
  bool is_own() const { return own_; }
  /// Copies `bytes` bytes from the process's address `from`. Returns 0 or errno; then some bytes
  /// may have been copied. Behind any number of reads, alive() tells whether they were of the
  /// process that was opened: its number may have gone to another one since.
  int read(void* to, const void* from, std::size_t bytes) const;
  bool alive() const;

 private:
  pid_t pid_ = 0;
  bool own_ = false;
  Fd process_;  // readable once the process has ended
};

}  // namespace deep_ep::fabric
