#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "protocol/host_waiter.hpp"

// Runs the kernels where there is a GPU; exits with 77, a skip, where there is none. No test
// framework: this program is copied to machines that have only a driver.
namespace deep_ep::cuda_test {
namespace {

constexpr int kSkipped = 77;

void check(int code, const char* what) {
  if (code != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " +
                             cudaGetErrorString(static_cast<cudaError_t>(code)));
}

int failures = 0;
void expect(bool ok, const char* claim) {
  std::printf("%s %s\n", ok ? "ok    " : "FAILED", claim);
  failures += !ok;
}

/// Zeroed objects that the device reaches: on the device, or on the host, mapped.
template <class T>
class Memory {
 public:
  static Memory on_device(std::size_t count = 1) { return Memory(count, false); }
  static Memory mapped(std::size_t count = 1) { return Memory(count, true); }
  ~Memory() { (void)(mapped_ ? cudaFreeHost(data_) : cudaFree(data_)); }
  Memory(const Memory&) = delete;

  T* get() const { return data_; }
  T* operator->() const { return data_; }
  T& operator*() const { return *data_; }
  std::vector<T> copy() const {
    std::vector<T> host(count_);
    check(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDefault), "cudaMemcpy");
    return host;
  }

 private:
  Memory(std::size_t count, bool mapped) : count_(count), mapped_(mapped) {
    const std::size_t bytes = count * sizeof(T);
    if (mapped) {
      check(cudaHostAlloc(reinterpret_cast<void**>(&data_), bytes, cudaHostAllocMapped),
            "cudaHostAlloc");
    } else {
      check(cudaMalloc(reinterpret_cast<void**>(&data_), bytes), "cudaMalloc");
    }
    check(cudaMemset(data_, 0, bytes), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaMemset");
  }
  T* data_ = nullptr;
  std::size_t count_;
  bool mapped_;
};

void finish(const char* kernel) { check(cudaDeviceSynchronize(), kernel); }

void test_flags_through_mapped_memory() {
  constexpr std::uint64_t kRounds = 2'000;
  const auto to_device = Memory<Message>::mapped();
  const auto to_host = Memory<Message>::mapped();
  const auto fault = Memory<protocol::FaultRecord>::mapped();
  const auto wrong = Memory<std::uint64_t>::mapped();
  check(launch_echo(to_device.get(), to_host.get(), fault.get(), kRounds, wrong.get()), "echo");

  protocol::Doorbell doorbell{};
  protocol::HostWaiter waiter(doorbell, *fault, std::chrono::nanoseconds(kTimeoutNs), false);
  std::uint64_t wrong_here = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (std::uint64_t epoch = 1; epoch <= kRounds; ++epoch) {
    for (int i = 0; i < Message::kWords; ++i) to_device->words[i] = epoch * (i + 1);
    to_device->flag.publish(epoch);
    const auto arrived = [&] { return to_host->flag.reached(epoch); };
    if (wait_until(waiter, arrived) != protocol::WaitResult::kReady) {
      ++wrong_here;
      break;
    }
    for (int i = 0; i < Message::kWords; ++i)
      wrong_here += to_host->words[i] != 3 * epoch * (i + 1);
  }
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
  finish("echo");
  expect(*wrong == 0 && wrong_here == 0, "flags and words cross between host and device");
  std::printf("       %.2f us a round trip\n", took.count() / kRounds);
}

void test_ring_between_blocks() {
  const auto flags = Memory<protocol::EpochFlag>::on_device(2);
  const auto data = Memory<std::byte>::on_device(RingTest::kRingBytes);
  const auto fault = Memory<protocol::FaultRecord>::on_device();
  const auto wrong = Memory<std::uint64_t>::on_device();
  check(launch_ring({flags.get(), flags.get() + 1, data.get(), fault.get(), wrong.get()}), "ring");
  finish("ring");
  expect(wrong.copy()[0] == 0, "a ring hands records of varying size from block to block");
}

void test_barrier_and_tickets() {
  constexpr int kBlocks = BarrierTest::kBlocks;
  const auto arrived = Memory<protocol::EpochFlag>::on_device(kBlocks * kBlocks);
  const auto work = Memory<std::uint64_t>::on_device(kBlocks);
  const auto tickets = Memory<protocol::TicketCounter>::on_device();
  const auto taken = Memory<std::uint32_t>::on_device(kBlocks);
  const auto fault = Memory<protocol::FaultRecord>::on_device();
  const auto wrong = Memory<std::uint64_t>::on_device();
  check(launch_barrier(
            {arrived.get(), work.get(), tickets.get(), taken.get(), fault.get(), wrong.get()}),
        "barrier");
  finish("barrier");
  expect(wrong.copy()[0] == 0, "work before a barrier is visible behind it to all blocks");
  const std::vector<std::uint32_t> numbers = taken.copy();
  const std::set<std::uint32_t> distinct(numbers.begin(), numbers.end());
  expect(distinct.size() == kBlocks && *distinct.rbegin() == kBlocks - 1,
         "every ticket is handed out once");
}

void test_waits_end() {
  const auto flag = Memory<protocol::EpochFlag>::on_device();
  const auto outcome = Memory<WaitOutcome>::mapped();
  {
    constexpr std::int64_t kShortNs = 20'000'000;
    const auto fault = Memory<protocol::FaultRecord>::mapped();
    check(launch_wait(flag.get(), fault.get(), kShortNs, outcome.get()), "wait");
    finish("wait");
    expect(outcome->result == protocol::WaitResult::kExpired, "a wait expires");
    expect(outcome->waited_ns >= kShortNs && outcome->waited_ns < 10 * kShortNs,
           "a wait lasts as long as its timeout");
  }
  const auto fault = Memory<protocol::FaultRecord>::mapped();
  check(launch_wait(flag.get(), fault.get(), kTimeoutNs, outcome.get()), "wait");
  expect(fault->claim(), "the host claims a fault record while the device waits");
  fault->publish();
  finish("wait");
  expect(outcome->result == protocol::WaitResult::kFaulted && outcome->waited_ns < kTimeoutNs,
         "a fault that the host writes ends a wait of the device");
}

void test_faults() {
  // On the device: the host's memory has no native atomics for a claim.
  const auto record = Memory<protocol::FaultRecord>::on_device();
  const auto claims = Memory<std::uint32_t>::on_device();
  check(launch_fault(record.get(), claims.get()), "fault");
  finish("fault");
  expect(claims.copy()[0] == 1, "the first writer of a fault record wins");
  const protocol::FaultRecord copy = record.copy()[0];
  expect(copy.load() == protocol::FaultRecord::kWritten && copy.ranks[0] == copy.origin + 100 &&
             copy.num_ranks == 1,
         "the host reads the device's fault whole");
}

// All 16-bit patterns, then 2^24 patterns spread over all floats.
void test_numerics() {
  struct Range {
    std::uint32_t step, count;
    const char* claim;
  };
  for (const Range& range :
       {Range{1, 1u << 16, "every bf16, fp16 and fp8 value converts as on the host"},
        Range{257, (1u << 24) + 1, "floats over the whole range convert as on the host"}}) {
    const auto out = Memory<Converted>::on_device(range.count);
    check(launch_convert(0, range.step, range.count, out.get()), "convert");
    const std::vector<Converted> device = out.copy();
    std::uint64_t wrong = 0;
    for (std::uint32_t i = 0; i < range.count; ++i) {
      if (device[i] == Converted::of(i * range.step)) continue;
      if (++wrong == 1) std::printf("       first at pattern 0x%08x\n", i * range.step);
    }
    expect(wrong == 0, range.claim);
  }
}

void test_sum_conversions() {
  const auto wrong = Memory<SumConversions>::on_device();
  check(launch_sum_conversions(wrong.get()), "sum_conversions");
  finish("sum_conversions");
  const SumConversions counts = wrong.copy()[0];
  expect(counts.narrow_bf16 == 0, "every float is rounded to bf16 by the hardware as by plan/");
  expect(counts.narrow_fp16 == 0, "every float is rounded to fp16 by the hardware as by plan/");
  expect(counts.widen_bf16 == 0 && counts.widen_fp16 == 0,
         "every bf16 and fp16 value widens alike");
}

void test_scales() {
  const auto wrong = Memory<Scales>::on_device();
  check(launch_scales(wrong.get()), "scales");
  finish("scales");
  expect(wrong.copy()[0].exact == 0, "every largest magnitude has plan/'s scale and inverse");
  expect(wrong.copy()[0].powers == 0, "and its powers of two");
}

void test_places() {
  const auto prefix = Memory<std::int32_t>::mapped(4);
  for (int i = 0; i < 4; ++i) prefix.get()[i] = 7 * (i + 1);
  const auto out = Memory<Carved>::mapped();
  auto* base = reinterpret_cast<std::byte*>(std::uintptr_t{1} << 40);
  check(launch_carve(base, prefix.get(), out.get()), "carve");
  finish("carve");
  const Carved host = carve_on_host(base, prefix.get());
  expect(std::memcmp(out.get(), &host, sizeof(host)) == 0,
         "sizes and places are the same on host and device");
  expect(host.ring_data_offset + (std::int64_t{72} * 16 << 24) == host.control_bytes,
         "the rings end the control block");
}

int run() {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    std::printf("skipped: no GPU (%s)\n", cudaGetErrorString(found));
    return kSkipped;
  }
  test_flags_through_mapped_memory();
  test_ring_between_blocks();
  test_barrier_and_tickets();
  test_waits_end();
  test_faults();
  test_numerics();
  test_sum_conversions();
  test_scales();
  test_places();
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace deep_ep::cuda_test

int main() {
  try {
    return deep_ep::cuda_test::run();
  } catch (const std::exception& error) {
    std::printf("FAILED %s\n", error.what());
    return 1;
  }
}
