#include "protocol/doorbell.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace deep_ep::protocol {

// Not FUTEX_PRIVATE: the word lies in memory shared between processes.
void Doorbell::ring() {
  add_seq_cst(&rung, std::uint32_t{1});
  if (load_seq_cst(&sleepers) != 0)
    syscall(SYS_futex, &rung, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Doorbell::futex_wait(std::uint32_t expected, std::int64_t ns) {
  const timespec timeout{ns / 1'000'000'000, ns % 1'000'000'000};
  syscall(SYS_futex, &rung, FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

}  // namespace deep_ep::protocol
