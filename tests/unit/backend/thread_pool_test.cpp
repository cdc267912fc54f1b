#include "backend/host/thread_pool.hpp"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <string>

#include "deep_ep/error.hpp"

namespace deep_ep::host {
namespace {

TEST(ThreadPool, ItsThreadsHandleOnlyTheirOwnCrashes) {
  ThreadPool pool(2);
  pool.run(2, [](int thread) {
    if (thread == 0) return;  // the caller
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    for (const int blocked : {SIGINT, SIGTERM, SIGALRM, SIGCHLD, SIGUSR1})
      EXPECT_EQ(sigismember(&mask, blocked), 1) << blocked;
    for (const int own : {SIGSEGV, SIGBUS, SIGABRT}) EXPECT_EQ(sigismember(&mask, own), 0) << own;
  });
  sigset_t mask;
  pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  EXPECT_EQ(sigismember(&mask, SIGINT), 0);  // the caller's is as it was
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// What the process dies of: 0 if the pool refuses with an Error that says so.
int pool_without_memory_for_stacks() {
  const rlimit limit{256U << 20, 256U << 20};  // a stack takes 8 MiB, or less
  setrlimit(RLIMIT_AS, &limit);
  try {
    const ThreadPool pool(1000);
    return 1;
  } catch (const Error& error) {
    const std::string text = error.what();
    return error.code() == ErrorCode::kOutOfMemory && text.starts_with("num_threads is 1000, ") ? 0
                                                                                                : 2;
  }
}

TEST(ThreadPool, ThreadsThatCannotStartAreAnError) {
  const pid_t child = fork();
  if (child == 0) _exit(pool_without_memory_for_stacks());
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << status;
  EXPECT_EQ(WEXITSTATUS(status), 0);
}
#endif

}  // namespace
}  // namespace deep_ep::host
