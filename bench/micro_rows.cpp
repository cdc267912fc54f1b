#include <benchmark/benchmark.h>

#include <cstring>
#include <vector>

#include "backend/host/rows.hpp"
#include "backend/host/wire.hpp"

// The kernels that move and sum rows, on memory that fits the caches (few rows) and that does not.
namespace deep_ep::host {
namespace {

constexpr std::int64_t kRowBytes = 7168 * 2;

/// Aligned like the results of a Buffer, and not zero.
struct Rows {
  explicit Rows(std::int64_t count)
      : memory(static_cast<std::byte*>(std::aligned_alloc(4096, size(count)))) {
    std::memset(memory, 0x3f, size(count));
  }
  ~Rows() { std::free(memory); }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  static std::size_t size(std::int64_t count) {
    return static_cast<std::size_t>((count * kRowBytes + 4095) / 4096 * 4096);
  }
  std::byte* at(std::int64_t row) const { return memory + row * kRowBytes; }

  std::byte* memory;
};

template <Stores kStores>
void copy(benchmark::State& state) {
  const std::int64_t count = state.range(0);
  const Rows from(count), to(count);
  for (auto _ : state) {
    for (std::int64_t row = 0; row < count; ++row)
      copy_row(to.at(row), from.at(row), kRowBytes, kStores);
    finish_stores();
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * count * kRowBytes);
}

// As a dispatch does it.
void copy_to_two(benchmark::State& state) {
  const std::int64_t count = state.range(0);
  const Rows from(count), one(count), two(count);
  for (auto _ : state) {
    for (std::int64_t row = 0; row < count; ++row) {
      std::byte* to[] = {one.at(row), two.at(row)};
      copy_row(to, 2, from.at(row), kRowBytes, Stores::kStreaming);
    }
    finish_stores();
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * count * kRowBytes);
}

// The rows of a low-latency combine in other formats, coded and summed.
template <plan::WireFormat kFormat>
void encode(benchmark::State& state) {
  const Rows from(1), to(1);
  for (auto _ : state) {
    encode_row(kFormat, from.at(0), kRowBytes / 2, to.at(0));
    benchmark::ClobberMemory();
  }
}

template <plan::WireFormat kFormat>
void sum_wire(benchmark::State& state) {
  const Rows from(1), wire(1), to(1);
  encode_row(kFormat, from.at(0), kRowBytes / 2, wire.at(0));
  const std::vector<const std::byte*> rows(static_cast<std::size_t>(state.range(0)), wire.at(0));
  for (auto _ : state) {
    sum_wire_rows({kFormat, kRowBytes / 2, rows.data(), static_cast<int>(rows.size()), to.at(0)});
    benchmark::ClobberMemory();
  }
}

template <Stores kStores>
void sum(benchmark::State& state) {
  const std::int64_t count = state.range(0);
  const int num_sources = static_cast<int>(state.range(1));
  const Rows from(count * num_sources), to(count);
  for (auto _ : state) {
    for (std::int64_t row = 0; row < count; ++row) {
      const std::byte* sources[8];
      for (int s = 0; s < num_sources; ++s) sources[s] = from.at(s * count + row);
      SumPiece piece;
      piece.count = kRowBytes / 2;
      piece.sources = sources;
      piece.num_sources = num_sources;
      piece.out = to.at(row);
      sum_piece(piece, kStores);
    }
    finish_stores();
    benchmark::ClobberMemory();
  }
  // Read and written.
  state.SetBytesProcessed(state.iterations() * count * kRowBytes * (num_sources + 1));
}

BENCHMARK(copy<Stores::kCached>)->ArgName("rows")->Arg(16)->Arg(8192);
BENCHMARK(copy<Stores::kStreaming>)->ArgName("rows")->Arg(16)->Arg(8192);
BENCHMARK(copy_to_two)->ArgName("rows")->Arg(4096);
BENCHMARK(sum<Stores::kCached>)
    ->ArgNames({"rows", "sources"})
    ->ArgsProduct({{16, 4096}, {1, 2, 4, 8}});
BENCHMARK(sum<Stores::kStreaming>)
    ->ArgNames({"rows", "sources"})
    ->ArgsProduct({{16, 4096}, {1, 2, 4, 8}});
BENCHMARK(encode<plan::WireFormat::kLogFmt>);
BENCHMARK(encode<plan::WireFormat::kFp8>);
BENCHMARK(sum_wire<plan::WireFormat::kLogFmt>)->Arg(1)->Arg(2);
BENCHMARK(sum_wire<plan::WireFormat::kFp8>)->Arg(1)->Arg(2);

}  // namespace
}  // namespace deep_ep::host
