#pragma once

#include <cstddef>
#include <cstdint>

#include "deep_ep/types.hpp"

// What the host does to the bytes of rows. Vectorised for the machine it runs on; the bits are
// those of plan/numerics.hpp.
namespace deep_ep::host {

/// Whether stores go past the caches. Worth it when what is written exceeds the last-level cache
/// (measured: docs/performance.md).
enum class Stores { kCached, kStreaming };

/// For a call that writes `bytes` bytes in all.
Stores choose_stores(std::int64_t bytes);

/// `bytes` and `to` are multiples of 16. Streaming stores become visible to other threads only
/// behind finish_stores().
void copy_row(std::byte* to, const std::byte* from, std::int64_t bytes, Stores stores);

/// The same to several places, read once.
void copy_row(std::byte* const* to, int count, const std::byte* from, std::int64_t bytes,
              Stores stores);

/// Orders this thread's streaming stores before what it publishes next.
void finish_stores();

/// One piece of a combined row: out = round(0 + source[0] + source[1] + ... + bias[0] + bias[1]),
/// in fp32, in that order. With weights a source counts by fma(weight, source, sum).
struct SumPiece {
  DType dtype = DType::kBfloat16;  // bfloat16, float16 or float32
  std::int64_t count = 0;          // elements
  const std::byte* const* sources = nullptr;
  int num_sources = 0;
  const float* weights = nullptr;  // of the sources, or null
  const std::byte* bias[2] = {nullptr, nullptr};
  std::byte* out = nullptr;
};
void sum_piece(const SumPiece& piece, Stores stores);

}  // namespace deep_ep::host
