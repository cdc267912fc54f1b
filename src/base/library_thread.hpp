#pragma once

#include <pthread.h>
#include <signal.h>

#include <exception>
#include <thread>
#include <utility>

#include "base/error.hpp"

namespace deep_ep {

/// A thread of the library's own: it handles no signal of the program's but those for what it does
/// itself, which a crash handler reports, and a profiler's. Throws Error(kOutOfMemory) if the
/// system has no more threads.
template <class Body>
std::thread start_library_thread(Body&& body) {
  struct Blocked {
    Blocked() {
      sigset_t blocked;
      sigfillset(&blocked);
      for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, SIGPROF})
        sigdelset(&blocked, own);
      pthread_sigmask(SIG_SETMASK, &blocked, &before);
    }
    ~Blocked() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
    sigset_t before{};
  };
  const Blocked blocked;  // a thread begins with its maker's mask
  try {
    return std::thread(std::forward<Body>(body));
  } catch (const std::exception& error) {
    throw Error(ErrorCode::kOutOfMemory, fmt::format("a thread cannot start: {}", error.what()));
  }
}

}  // namespace deep_ep
