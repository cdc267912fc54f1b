#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <utility>

namespace deep_ep::fabric {

/// A file descriptor that closes itself.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() { reset(); }
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset();

 private:
  int fd_ = -1;
};

/// A point in time after which waiting ends.
class Deadline {
 public:
  explicit Deadline(std::chrono::milliseconds timeout);
  bool expired() const { return std::chrono::steady_clock::now() >= end_; }
  /// What is left, for poll(): 0 once expired.
  int poll_ms() const;
  std::chrono::steady_clock::time_point end() const { return end_; }

 private:
  std::chrono::steady_clock::time_point end_;
};

enum class Io { kDone, kClosed, kExpired };

// All of `bytes` over a connected, non-blocking stream socket. kClosed: the other end is gone.
Io send_all(int fd, const void* data, std::size_t bytes, const Deadline& deadline);
Io receive_all(int fd, void* data, std::size_t bytes, const Deadline& deadline);

void set_nonblocking(int fd);
std::string random_bytes(std::size_t count);
std::string to_hex(const std::string& bytes);

}  // namespace deep_ep::fabric
