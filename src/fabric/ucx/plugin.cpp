#include <cstring>

#include "base/error.hpp"
#include "fabric/agree.hpp"
#include "fabric/ucx/heap.hpp"

namespace deep_ep::fabric::ucx {
namespace {

void compare_sizes(const std::vector<std::string>& sizes, std::int64_t mine) {
  for (std::size_t rank = 0; rank < sizes.size(); ++rank) {
    require(sizes[rank].size() == sizeof(mine), "rank {} is of another version", rank);
    std::int64_t theirs = 0;
    std::memcpy(&theirs, sizes[rank].data(), sizeof(theirs));
    if (theirs == mine) continue;
    throw Error(
        ErrorCode::kDisagreement,
        fmt::format("bytes of the symmetric heap: {} here, {} on rank {}", mine, theirs, rank),
        {static_cast<int>(rank)});
  }
}

std::unique_ptr<UcxHeap> make(Bootstrap& bootstrap, const SymmetricHeapOptions& options) {
  compare_sizes(
      bootstrap.all_gather({reinterpret_cast<const char*>(&options.bytes), sizeof(options.bytes)}),
      options.bytes);
  std::unique_ptr<UcxHeap> heap;
  std::string address;
  together(bootstrap, [&] {
    heap = std::make_unique<UcxHeap>(bootstrap.rank(), bootstrap.size(), options);
    address = heap->address();
  });
  const auto addresses = bootstrap.all_gather(address);
  together(bootstrap, [&] {
    heap->make_endpoints(addresses);
    heap->start();
  });
  together(bootstrap, [&] { heap->greet_all(); });
  return heap;
}

}  // namespace
}  // namespace deep_ep::fabric::ucx

/// The one function that this library exports.
extern "C" __attribute__((visibility("default"))) deep_ep::fabric::SymmetricHeap* deep_ep_ucx_heap(
    deep_ep::Bootstrap& bootstrap, const deep_ep::fabric::SymmetricHeapOptions& options) {
  return deep_ep::fabric::ucx::make(bootstrap, options).release();
}
