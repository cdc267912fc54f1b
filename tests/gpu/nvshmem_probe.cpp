#include <cuda_runtime.h>
#include <nvshmem_host.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "backend/cuda/check.hpp"
#include "backend/cuda/nvshmem/puts.hpp"
#include "backend/cuda/nvshmem/world.hpp"
#include "deep_ep/deep_ep.hpp"
#include "gpu/nvshmem_exchange.hpp"

// What NVSHMEM can do here: ranks that are processes, which may share GPUs, join it, put to each
// other with signals and poll for these with a timeout of their own, beside the segments of a
// Buffer.

namespace deep_ep::test {
namespace {

int run_exchanges(Bootstrap& bootstrap, std::byte* base) {
  const int rank = bootstrap.rank();
  const int ranks = bootstrap.size();
  ExchangeReport* report = nullptr;
  cuda::check(cudaMallocManaged(&report, sizeof *report), "cudaMallocManaged");
  std::uint64_t first = 1;
  int bad = 0;
  for (const std::int64_t bytes : {std::int64_t{8}, std::int64_t{16} << 10, kMostBytes}) {
    constexpr int kRounds = 50;
    std::memset(report, 0, sizeof *report);
    bootstrap.barrier();
    cuda::check(launch_exchange(base, rank, ranks, bytes, first, kRounds, report),
                "launch of exchange");
    cuda::check(cudaDeviceSynchronize(), "exchange");
    first += kRounds;
    const double us = static_cast<double>(report->ns) / 1000 / kRounds;
    std::printf(
        "rank %d: %8lld bytes to each of %d: %9.2f us a round, %7.3f GB/s, %d words wrong, "
        "%d signals late\n",
        rank, static_cast<long long>(bytes), ranks - 1, us,
        static_cast<double>(bytes * (ranks - 1)) / us / 1000, report->wrong, report->late);
    bad += report->wrong + report->late;
    bootstrap.barrier();
  }
  cuda::check(cudaFree(report), "cudaFree");
  return bad;
}

/// What calls between nodes are measured by; the words that came wrong.
std::int64_t measure_puts(Bootstrap& bootstrap, int device) {
  std::int64_t wrong = 0;
  for (const int num_sms : {20, 0}) {
    const PutRate rate = cuda::nvshmem::measure_puts(bootstrap, device, {num_sms, 1});
    std::printf("rank %d: puts of %lld KiB by %d blocks: %.1f GB/s, %lld of %lld words wrong\n",
                bootstrap.rank(), static_cast<long long>(rate.put_bytes >> 10), rate.num_sms,
                rate.bytes_per_second / 1e9, static_cast<long long>(rate.wrong_words),
                static_cast<long long>(rate.checked_words));
    wrong += rate.wrong_words;
  }
  return wrong;
}

constexpr int kSkipped = 77;

int play(const std::shared_ptr<Bootstrap>& bootstrap) {
  const int gpus = num_devices(DeviceType::kCuda);
  if (gpus == 0) return kSkipped;
  const int device = bootstrap->rank() % gpus;
  cuda::check(cudaSetDevice(device), "cudaSetDevice");
  BufferOptions options;
  options.device = {DeviceType::kCuda, device};
  options.num_nvl_bytes = 64 << 20;
  Buffer before(bootstrap, options);
  before.barrier();
  auto& world = cuda::nvshmem::World::instance();
  const std::int64_t bytes = ExchangeLayout::bytes(bootstrap->size());
  const auto heap = world.allocate(*bootstrap, device, bytes);
  std::printf("rank %d: joined, %s its GPU is %d, heap at %p\n", bootstrap->rank(),
              nvshmem_ptr(heap->base(), (bootstrap->rank() + 1) % bootstrap->size()) != nullptr
                  ? "the next rank's heap is mapped here,"
                  : "the next rank's heap is not mapped here,",
              device, static_cast<void*>(heap->base()));
  int bad = run_exchanges(*bootstrap, heap->base());
  const std::byte* second = world.allocate(*bootstrap, device, bytes)->base();
  const auto again = world.allocate(*bootstrap, device, bytes);
  std::printf("rank %d: a piece that was given back is %s\n", bootstrap->rank(),
              again->base() == second ? "used again" : "NOT used again");
  bad += again->base() == second ? 0 : 1;
  bad += run_exchanges(*bootstrap, again->base());
  bad += measure_puts(*bootstrap, device) == 0 ? 0 : 1;
  before.barrier();
  Buffer after(bootstrap, options);
  after.barrier();
  std::printf("rank %d: Buffers of one node work before and after\n", bootstrap->rank());
  return bad == 0 ? 0 : 1;
}

}  // namespace
}  // namespace deep_ep::test

int main(int argc, char** argv) {
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 2;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  int failed = 0;
  int skipped = 0;
  for (const auto& exit : deep_ep::run_forked(ranks, [](const auto& bootstrap) {
         try {
           return deep_ep::test::play(bootstrap);
         } catch (const std::exception& error) {
           std::printf("rank %d: %s\n", bootstrap->rank(), error.what());
           return 1;
         }
       })) {
    skipped += exit.status == deep_ep::test::kSkipped ? 1 : 0;
    if (exit.status == 0 || exit.status == deep_ep::test::kSkipped) continue;
    std::printf("rank %d ended with %d\n", exit.rank, exit.status);
    ++failed;
  }
  std::printf("%d passed, %d failed, %d skipped\n", ranks - failed - skipped, failed, skipped);
  return failed != 0 ? 1 : skipped != 0 ? deep_ep::test::kSkipped : 0;
}
