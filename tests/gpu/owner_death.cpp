// What becomes of a kernel that writes to another process's memory when that process is killed, and
// whether memory can be mapped while a kernel runs. The answers decide which kind of memory is the
// default: docs/adr/0007-gpu-memory-outlives-its-owner.md. Prints them; fails only if the default
// kind does not behave as the library relies on.
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

#include "backend/cuda/check.hpp"
#include "backend/cuda/memory/memory.hpp"
#include "fabric/link.hpp"
#include "writer.hpp"

namespace {

using namespace deep_ep;
using cuda::check;

constexpr std::int64_t kBytes = 64 << 20;
constexpr int kSkipped = 77;

std::unique_ptr<fabric::Memory> make(bool vmm) {
  return vmm ? cuda::make_vmm_memory(0) : cuda::make_ipc_memory(0);
}

/// The owner: hands its memory over and waits to be killed.
[[noreturn]] void own(bool vmm, int link) {
  const auto memory = make(vmm);
  const auto mapping = memory->allocate(kBytes);
  const fabric::Descriptor descriptor = memory->describe(*mapping);
  const fabric::Message message{fabric::Message::Kind::kSegment, 0, descriptor.bytes};
  (void)fabric::send_packet(link, message.encode(), descriptor.fd);
  for (;;) pause();
}

fabric::Received await(int link) {
  for (int i = 0; i < 30000; ++i) {
    fabric::Received received = fabric::receive_packet(link);
    if (received.state != fabric::Received::State::kNothing) return received;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return {};
}

double ms_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

/// The writer: returns "" if its context survived.
std::string write_and_watch(bool vmm, int link, pid_t owner) {
  const fabric::Received received = await(link);
  if (received.state != fabric::Received::State::kMessage) return "no descriptor came";
  const auto memory = make(vmm);
  int* stop = nullptr;
  unsigned long long* rounds = nullptr;
  check(cudaMallocHost(&stop, sizeof *stop), "cudaMallocHost");
  check(cudaMalloc(&rounds, sizeof *rounds), "cudaMalloc");
  *stop = 0;
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const auto mapping = memory->map({received.message.descriptor, received.fd.get()});
  check(gpu_test::start_writer(stream, stop, mapping->base(), kBytes, rounds), "launch");
  std::this_thread::sleep_for(std::chrono::milliseconds(200));

  // Does mapping wait for the kernel that runs?
  auto begin = std::chrono::steady_clock::now();
  std::thread mapper([&] {
    const auto again = memory->map({received.message.descriptor, received.fd.get()});
    std::printf("  mapped again beside a running kernel after %.1f ms\n", ms_since(begin));
    std::fflush(stdout);
    *static_cast<volatile int*>(stop) = cudaStreamQuery(stream) == cudaErrorNotReady ? 0 : 2;
    // Unmapping waits for the kernel, so keep it.
    (void)new auto(again);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(1000));
  begin = std::chrono::steady_clock::now();
  kill(owner, SIGKILL);
  waitpid(owner, nullptr, 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  const cudaError_t after_death = cudaStreamQuery(stream);
  std::printf("  1.5 s after the owner's death the writer's stream says %s\n",
              cudaGetErrorName(after_death));
  *static_cast<volatile int*>(stop) = 1;
  const cudaError_t end = cudaStreamSynchronize(stream);
  mapper.join();
  unsigned long long done = 0;
  const cudaError_t copy = cudaMemcpy(&done, rounds, sizeof done, cudaMemcpyDeviceToHost);
  unsigned long long last = 0;
  const cudaError_t read = cudaMemcpy(&last, mapping->base(), sizeof last, cudaMemcpyDeviceToHost);
  std::printf("  kernel ended with %s, then %s and %s; %llu rounds, first word %llu\n",
              cudaGetErrorName(end), cudaGetErrorName(copy), cudaGetErrorName(read), done, last);
  if (end != cudaSuccess || copy != cudaSuccess) return cudaGetErrorName(end);
  return last == done ? "" : "the memory does not hold what was written";
}

int probe(bool vmm) {
  std::printf("%s:\n", vmm ? "VMM" : "CUDA IPC");
  std::fflush(stdout);
  int links[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, links) != 0) return 1;
  const pid_t owner = fork();
  if (owner == 0) {
    try {
      own(vmm, links[1]);
    } catch (const std::exception& error) {
      std::printf("  owner: %s\n", error.what());
      std::fflush(stdout);
      _exit(1);
    }
  }
  close(links[1]);
  const pid_t writer = fork();
  if (writer == 0) {
    std::string wrong;
    try {
      wrong = write_and_watch(vmm, links[0], owner);
    } catch (const std::exception& error) {
      wrong = error.what();
    }
    std::printf("  writer %s\n", wrong.empty() ? "unharmed" : wrong.c_str());
    std::fflush(stdout);
    _exit(wrong.empty() ? 0 : 1);
  }
  int status = 0;
  waitpid(writer, &status, 0);
  kill(owner, SIGKILL);
  waitpid(owner, nullptr, 0);
  close(links[0]);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace

int main() {
  // In a child: the parent must not touch CUDA before it forks.
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    _exit(cudaGetDeviceCount(&count) == cudaSuccess && count > 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (status != 0) {
    std::printf("SKIPPED: no GPU\n");
    return kSkipped;
  }
  const int ipc = probe(false);
  const int vmm = probe(true);
  std::printf("CUDA IPC %s, VMM %s\n", ipc == 0 ? "survives" : "fails",
              vmm == 0 ? "survives" : "fails");
  return vmm;
}
