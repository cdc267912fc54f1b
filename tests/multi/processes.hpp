#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <fstream>
#include <string>

// How processes of a test wait for one another: by what has happened, not by time.
namespace deep_ep {

/// Made before the processes are forked.
class Gate {
 public:
  Gate() { EXPECT_EQ(pipe(ends_), 0); }
  ~Gate() {
    for (const int end : ends_) close(end);
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  /// Lets through who waits once.
  void open() { EXPECT_EQ(write(ends_[1], "", 1), 1); }
  void wait(int times = 1) {
    for (int i = 0; i < times; ++i) {
      pollfd polled{ends_[0], POLLIN, 0};
      ASSERT_EQ(poll(&polled, 1, kLimitMs), 1) << "what is waited for does not happen";
      char byte = 0;
      ASSERT_EQ(read(ends_[0], &byte, 1), 1);
    }
  }

 private:
  static constexpr int kLimitMs = 30'000;
  int ends_[2] = {-1, -1};
};

/// Whether a signal has stopped the process.
inline bool is_stopped(const std::string& pid) {
  std::ifstream stat("/proc/" + pid + "/stat");
  std::string number, name, state;
  stat >> number >> name >> state;
  return state == "T";
}

}  // namespace deep_ep
