#include "fabric/process_memory.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

namespace deep_ep::fabric {
namespace {

std::string reason(const char* call, int error) {
  return fmt::format("{}: {}", call, std::generic_category().message(error));
}

}  // namespace

Beacon::Beacon() {
  const std::string random = random_bytes(sizeof words_);
  std::memcpy(words_.data(), random.data(), sizeof words_);
}

Beacon::Sight Beacon::sight() const {
  return {getpid(), reinterpret_cast<std::uintptr_t>(words_.data()), words_};
}

std::string ProcessMemory::open(const Beacon::Sight& sight) {
  pid_ = static_cast<pid_t>(sight.pid);
  // Before the words are read: who then shows the right words is the process that stays watched.
  process_ = Fd(static_cast<int>(syscall(SYS_pidfd_open, pid_, 0)));
  if (!process_) return reason("pidfd_open", errno);
  std::array<std::uint64_t, Beacon::kWords> seen{};
  const int error = read(seen.data(), reinterpret_cast<const void*>(sight.address), sizeof seen);
  if (error != 0) return reason("process_vm_readv", error);
  if (seen != sight.words) return fmt::format("process {} is another one here", sight.pid);
  own_ = pid_ == getpid();
  return {};
}

int ProcessMemory::read(void* to, const void* from, std::size_t bytes) const {
  std::size_t done = 0;
  while (done < bytes) {
    const iovec here{static_cast<std::byte*>(to) + done, bytes - done};
    const iovec there{const_cast<std::byte*>(static_cast<const std::byte*>(from)) + done,
                      bytes - done};
    const ssize_t copied = process_vm_readv(pid_, &here, 1, &there, 1, 0);
    if (copied < 0) return errno;
    if (copied == 0) return EFAULT;
    done += static_cast<std::size_t>(copied);
  }
  return 0;
}

bool ProcessMemory::alive() const {
  pollfd watched{process_.get(), POLLIN, 0};
  return poll(&watched, 1, 0) == 0;
}

}  // namespace deep_ep::fabric
