#include "backend/cuda/device/scales.cuh"
#include "backend/cuda/device/sums.cuh"
#include "device_waiter.cuh"
#include "kernels.hpp"
#include "plan/layout.hpp"
#include "protocol/barrier.hpp"

namespace deep_ep::cuda_test {
namespace {

using protocol::wait_until;
using protocol::WaitResult;

__global__ void echo(Message* from_host, Message* to_host, const protocol::FaultRecord* fault,
                     std::uint64_t rounds, std::uint64_t* wrong) {
  DeviceWaiter waiter{fault, kTimeoutNs};
  for (std::uint64_t epoch = 1; epoch <= rounds; ++epoch) {
    // acquire: pairs with the host's publish; its words are here.
    const WaitResult result = wait_until(waiter, [&] { return from_host->flag.reached(epoch); });
    if (result != WaitResult::kReady) {
      ++*wrong;
      return;
    }
    for (int i = 0; i < Message::kWords; ++i) {
      const std::uint64_t word = from_host->words[i];
      *wrong += word != epoch * (i + 1);
      to_host->words[i] = word * 3;
    }
    to_host->flag.publish(epoch);
  }
}

// Calls `work(place, words, value)` by the whole warp for each record, `place` as lane 0's
// `next(size)` gave it, and `done(size)` by lane 0 behind it. False if a wait failed.
template <class Next, class Work, class Done>
__device__ bool for_each_record(const RingTest& test, Next next, Work work, Done done) {
  DeviceWaiter waiter{test.fault, kTimeoutNs};
  for (int call = 0; call < RingTest::kCalls; ++call) {
    const int words = RingTest::record_words(call);
    const std::int64_t size = words * std::int64_t{sizeof(std::uint64_t)};
    for (int record = 0; record < RingTest::records(call); ++record) {
      unsigned long long place = 0;
      if (threadIdx.x == 0)
        (void)wait_until(waiter, [&] {
          return (place = reinterpret_cast<unsigned long long>(next(size))) != 0;
        });
      place = __shfl_sync(0xffffffff, place, 0);
      if (place == 0) return false;
      __syncwarp();  // what lane 0 acquired is now visible to all lanes; the shuffle orders nothing
      work(place, words, std::uint64_t(call) * 1000 + record);
      __syncwarp();
      if (threadIdx.x == 0) done(size);
    }
  }
  return true;
}

__device__ bool send(const RingTest& test) {
  protocol::RingSender sender{{RingTest::kRingBytes}, test.data, test.tail, test.head, 0, 0};
  return for_each_record(
      test, [&](std::int64_t size) { return sender.reserve(size); },
      [](unsigned long long place, int words, std::uint64_t value) {
        auto* to = reinterpret_cast<std::uint64_t*>(place);
        for (int i = threadIdx.x; i < words; i += 32) to[i] = value;
      },
      [&](std::int64_t size) {
        sender.advance(size);
        sender.publish();
      });
}

__device__ bool receive(const RingTest& test) {
  protocol::RingReceiver receiver{{RingTest::kRingBytes}, test.data, test.tail, test.head, 0, 0};
  return for_each_record(
      test, [&](std::int64_t size) { return receiver.peek(size); },
      [&](unsigned long long place, int words, std::uint64_t value) {
        const auto* from = reinterpret_cast<const std::uint64_t*>(place);
        for (int i = threadIdx.x; i < words; i += 32) {
          if (from[i] != value) protocol::add_relaxed(test.wrong, std::uint64_t{1});
        }
      },
      [&](std::int64_t size) {
        receiver.advance(size);
        receiver.release();
      });
}

__global__ void ring(const RingTest test) {
  const bool done = blockIdx.x == 0 ? send(test) : receive(test);
  if (!done && threadIdx.x == 0) protocol::add_relaxed(test.wrong, std::uint64_t{1});
}

__global__ void barriers(const BarrierTest test) {
  constexpr int kBlocks = BarrierTest::kBlocks;
  const int me = blockIdx.x;
  DeviceWaiter waiter{test.fault, kTimeoutNs};
  const auto pass = [&](std::uint64_t epoch) {
    return protocol::barrier(
        waiter, kBlocks, epoch, [&](int i) { return &test.arrived[i * kBlocks + me]; },
        &test.arrived[me * kBlocks], [](int) {});
  };
  std::uint64_t wrong = 0;
  test.taken[me] = static_cast<std::uint32_t>(test.tickets->take());
  for (std::uint64_t epoch = 1; epoch <= 2 * BarrierTest::kEpochs; epoch += 2) {
    test.work[me] = epoch * (me + 1);
    wrong += pass(epoch) != WaitResult::kReady;
    for (int i = 0; i < kBlocks; ++i) wrong += test.work[i] != epoch * (i + 1);
    wrong += pass(epoch + 1) != WaitResult::kReady;
    if (wrong != 0) break;
  }
  protocol::add_relaxed(test.wrong, wrong);
}

__global__ void wait(const protocol::EpochFlag* flag, const protocol::FaultRecord* fault,
                     std::int64_t timeout_ns, WaitOutcome* outcome) {
  DeviceWaiter waiter{fault, timeout_ns};
  const std::int64_t begin = cuda::globaltimer();
  outcome->result = wait_until(waiter, [&] { return flag->reached(1); });
  outcome->waited_ns = cuda::globaltimer() - begin;
}

__global__ void fill_fault(protocol::FaultRecord* record, std::uint32_t* claims) {
  if (!record->claim()) return;
  protocol::add_relaxed(claims, 1u);
  record->origin = static_cast<std::int32_t>(blockIdx.x);
  record->ranks[0] = static_cast<std::int32_t>(blockIdx.x) + 100;
  record->num_ranks = 1;
  record->publish();
}

__global__ void convert(std::uint32_t first, std::uint32_t step, std::uint32_t count,
                        Converted* out) {
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = Converted::of(first + i * step);
}

__global__ void carve(std::byte* base, const std::int32_t* prefix, Carved* out) {
  *out = Carved::at(base, prefix);
}

}  // namespace

DEEP_EP_HD Carved Carved::at(std::byte* base, const std::int32_t* prefix) {
  const protocol::ControlShape shape{72, 16, std::int64_t{1} << 24};
  const plan::RowFormat format{14336, 224, 64, 32};
  const std::int64_t rows = 1'000'003;
  Carver control(base);
  Carver recv(base);
  return {
      .control_bytes = protocol::ControlBlock::bytes(shape),
      .ring_data_offset = protocol::ControlBlock::carve(control, shape).ring_data - base,
      .recv_bytes = plan::RecvArrays::bytes(format, rows),
      .recv_src_idx_offset =
          reinterpret_cast<std::byte*>(plan::RecvArrays::carve(recv, format, rows).src_idx) - base,
      .channel_begin = plan::channel_begin(2'147'483'647, 19, 20),
      .rows_begin = plan::rows_from(prefix, 1, 1, 2).begin};
}

namespace {

__device__ bool same_number(float a, float b) {
  return plan::bit_cast<std::uint32_t>(a) == plan::bit_cast<std::uint32_t>(b) || (a != a && b != b);
}

template <class Pair, class Plan>
__device__ void compare(std::uint32_t bits, unsigned long long* narrow_wrong,
                        unsigned long long* widen_wrong) {
  const float value = plan::bit_cast<float>(bits);
  Pair pair;
  cuda::narrow({value, -value}, pair);
  const auto* got = reinterpret_cast<const std::uint16_t*>(&pair);
  if (got[0] != plan::from_float<Plan>(value).bits || got[1] != plan::from_float<Plan>(-value).bits)
    atomicAdd(narrow_wrong, 1ULL);
  if (bits >> 16 != 0) return;
  const auto half = static_cast<std::uint16_t>(bits);
  const std::uint16_t both[2] = {half, half};
  const float2 wide = cuda::widen(*reinterpret_cast<const Pair*>(both));
  const float want = plan::to_float(Plan{half});
  if (!same_number(wide.x, want) || !same_number(wide.y, want)) atomicAdd(widen_wrong, 1ULL);
}

__global__ void sum_conversions(SumConversions* wrong) {
  const std::uint64_t step = std::uint64_t{gridDim.x} * blockDim.x;
  for (std::uint64_t bits = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       bits < std::uint64_t{1} << 32; bits += step) {
    const auto pattern = static_cast<std::uint32_t>(bits);
    compare<__nv_bfloat162, plan::Bfloat16>(pattern, &wrong->narrow_bf16, &wrong->widen_bf16);
    compare<__half2, plan::Float16>(pattern, &wrong->narrow_fp16, &wrong->widen_fp16);
  }
}

__device__ bool same_scale(const plan::Fp8Scale& a, const plan::Fp8Scale& b) {
  return __float_as_uint(a.scale) == __float_as_uint(b.scale) &&
         __float_as_uint(a.inverse) == __float_as_uint(b.inverse);
}

__global__ void scales(Scales* wrong) {
  // Up to infinity, and a NaN.
  constexpr std::uint32_t kEnd = 0x7f800002;
  const std::uint32_t step = gridDim.x * blockDim.x;
  for (std::uint32_t bits = blockIdx.x * blockDim.x + threadIdx.x; bits < kEnd; bits += step) {
    const float amax = plan::bit_cast<float>(bits);
    const float number = amax == amax ? amax : 0.0f;
    if (!same_scale(cuda::fp8_scale(amax, true), plan::fp8_scale(number)))
      atomicAdd(&wrong->exact, 1ULL);
    if (!same_scale(cuda::fp8_scale(amax, false), plan::fp8_power_of_two_scale(number)))
      atomicAdd(&wrong->powers, 1ULL);
  }
}

}  // namespace

Carved carve_on_host(std::byte* base, const std::int32_t* prefix) {
  return Carved::at(base, prefix);
}

int launch_echo(Message* from_host, Message* to_host, const protocol::FaultRecord* fault,
                std::uint64_t rounds, std::uint64_t* wrong) {
  echo<<<1, 1>>>(from_host, to_host, fault, rounds, wrong);
  return cudaGetLastError();
}
int launch_ring(const RingTest& test) {
  ring<<<2, 32>>>(test);
  return cudaGetLastError();
}
int launch_barrier(const BarrierTest& test) {
  barriers<<<BarrierTest::kBlocks, 1>>>(test);
  return cudaGetLastError();
}
int launch_wait(const protocol::EpochFlag* flag, const protocol::FaultRecord* fault,
                std::int64_t timeout_ns, WaitOutcome* outcome) {
  wait<<<1, 1>>>(flag, fault, timeout_ns, outcome);
  return cudaGetLastError();
}
int launch_fault(protocol::FaultRecord* record, std::uint32_t* claims) {
  fill_fault<<<64, 1>>>(record, claims);
  return cudaGetLastError();
}
int launch_convert(std::uint32_t first, std::uint32_t step, std::uint32_t count, Converted* out) {
  constexpr std::uint32_t kThreads = 256;
  convert<<<(count + kThreads - 1) / kThreads, kThreads>>>(first, step, count, out);
  return cudaGetLastError();
}
int launch_scales(Scales* wrong) {
  scales<<<1024, 256>>>(wrong);
  return cudaGetLastError();
}
int launch_sum_conversions(SumConversions* wrong) {
  sum_conversions<<<1024, 256>>>(wrong);
  return cudaGetLastError();
}
int launch_carve(std::byte* base, const std::int32_t* prefix, Carved* out) {
  carve<<<1, 1>>>(base, prefix, out);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda_test
