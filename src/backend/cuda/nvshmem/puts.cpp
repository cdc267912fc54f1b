#include "backend/cuda/nvshmem/puts.hpp"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/nvshmem/world.hpp"
#include "backend/cuda/stopwatch.hpp"

namespace deep_ep::cuda::nvshmem {

namespace {

constexpr std::int64_t kPutBytes = 1 << 20;
constexpr int kRounds = 20;
constexpr int kTurns = 4;  // of which the first is not counted

/// Milliseconds that the puts of this rank took.
double time_puts(const PutArrays& arrays, int peer, int blocks) {
  Stopwatch watch(cudaStreamPerThread);
  watch.start();
  check(launch_puts(arrays, peer, blocks, kRounds, cudaStreamPerThread), "launch of puts");
  watch.stop();
  return watch.milliseconds();
}

std::int64_t count_wrong(const PutArrays& arrays, std::int64_t words, int rank, int blocks) {
  unsigned long long* wrong = nullptr;
  check(cudaMalloc(&wrong, sizeof *wrong), "cudaMalloc");
  const std::unique_ptr<void, void (*)(void*)> owner(wrong,
                                                     [](void* memory) { (void)cudaFree(memory); });
  check(cudaMemsetAsync(wrong, 0, sizeof *wrong, cudaStreamPerThread), "cudaMemsetAsync");
  check(launch_compare(arrays.to, words, rank, blocks, wrong, cudaStreamPerThread),
        "launch of compare");
  unsigned long long count = 0;
  check(cudaMemcpyAsync(&count, wrong, sizeof count, cudaMemcpyDefault, cudaStreamPerThread),
        "copy of wrong words");
  check(cudaStreamSynchronize(cudaStreamPerThread), "comparison of what was put");
  return static_cast<std::int64_t>(count);
}

}  // namespace

PutRate measure_puts(Bootstrap& bootstrap, int device, const PutPlan& plan) {
  const DeviceGuard guard(device);
  PutRate rate;
  rate.num_sms = plan.num_sms;
  if (rate.num_sms == 0)
    check(cudaDeviceGetAttribute(&rate.num_sms, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
  rate.put_bytes = kPutBytes;
  const std::int64_t bytes = rate.num_sms * kPutBytes;
  const auto heap = World::instance().allocate(bootstrap, device, 2 * bytes);
  auto* words = reinterpret_cast<std::uint64_t*>(heap->base());
  const PutArrays arrays{words, words + bytes / 8, kPutBytes / 8};
  const int ranks = bootstrap.size();
  const int peer = (bootstrap.rank() + plan.distance) % ranks;
  const int source = (bootstrap.rank() + ranks - plan.distance % ranks) % ranks;
  check(launch_fill(words + bytes / 8, bytes / 8, bootstrap.rank(), rate.num_sms,
                    cudaStreamPerThread),
        "launch of fill");
  check(cudaStreamSynchronize(cudaStreamPerThread), "fill of what is put");
  std::vector<double> slowest;
  for (int turn = 0; turn < kTurns; ++turn) {
    bootstrap.barrier();
    double ms = 0;
    for (const std::string& one :
         bootstrap.all_gather(std::to_string(time_puts(arrays, peer, rate.num_sms))))
      ms = std::max(ms, std::stod(one));
    if (turn > 0) slowest.push_back(ms);
  }
  std::sort(slowest.begin(), slowest.end());
  rate.bytes_per_second = static_cast<double>(bytes) * kRounds / slowest[slowest.size() / 2] * 1e3;
  rate.checked_words = bytes / 8 * ranks;
  for (const std::string& one :
       bootstrap.all_gather(std::to_string(count_wrong(arrays, bytes / 8, source, rate.num_sms))))
    rate.wrong_words += std::stoll(one);
  return rate;
}

}  // namespace deep_ep::cuda::nvshmem
