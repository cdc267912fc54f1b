#include "backend/host/rows.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/host/rows.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cmath>
#include <cstring>
#include <type_traits>

// A race detector does not see streaming stores and non-vector code is easier on it: plain stores
// there.
#if defined(__SANITIZE_THREAD__)
#define DEEP_EP_PLAIN_STORES 1
#else
#define DEEP_EP_PLAIN_STORES 0
#endif

HWY_BEFORE_NAMESPACE();
namespace deep_ep::host::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

void copy_streaming(std::byte* to, const std::byte* from, std::int64_t bytes) {
  const hn::ScalableTag<std::uint8_t> wide;
  const hn::CappedTag<std::uint8_t, 16> narrow;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(wide));
  const auto few = static_cast<std::int64_t>(hn::Lanes(narrow));
  auto* out = reinterpret_cast<std::uint8_t*>(to);
  const auto* in = reinterpret_cast<const std::uint8_t*>(from);
  if (reinterpret_cast<std::uintptr_t>(out) % few != 0) {  // a caller's
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return;
  }
  std::int64_t i = 0;
  for (; i < bytes && reinterpret_cast<std::uintptr_t>(out + i) % lanes != 0; i += few) {
    hn::Stream(hn::LoadU(narrow, in + i), narrow, out + i);
  }
  for (; i + lanes <= bytes; i += lanes) hn::Stream(hn::LoadU(wide, in + i), wide, out + i);
  for (; i < bytes; i += few) hn::Stream(hn::LoadU(narrow, in + i), narrow, out + i);
}

// Processors fetch ahead within a page of memory only, and do not look far while they compute: a
// core of a Xeon sums two rows in 20 % less time with it.
constexpr std::int64_t kAhead = 1024;

HWY_INLINE void prefetch(const void* from, std::int64_t bytes) {
  const auto* ahead = static_cast<const std::byte*>(from) + kAhead;
  for (std::int64_t at = 0; at < bytes; at += 64) hwy::Prefetch(ahead + at);
}

// Rows that are read once and written to several places, a few cache lines to each in turn: twice
// the rows in the same time as row after row to each place, where memory is not the limit.
constexpr std::int64_t kTurn = 256;

void copy_streaming_to(std::byte* const* to, int count, const std::byte* from, std::int64_t bytes) {
  const hn::ScalableTag<std::uint8_t> wide;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(wide));
  bool aligned = true;
  for (int i = 0; i < count; ++i) {
    aligned = aligned && reinterpret_cast<std::uintptr_t>(to[i]) % lanes == 0;
  }
  const std::int64_t turns_end = aligned && kTurn % lanes == 0 ? bytes / kTurn * kTurn : 0;
  const auto* in = reinterpret_cast<const std::uint8_t*>(from);
  for (std::int64_t begin = 0; begin < turns_end; begin += kTurn) {
    for (int i = 0; i < count; ++i) {
      auto* out = reinterpret_cast<std::uint8_t*>(to[i]);
      for (std::int64_t at = begin; at < begin + kTurn; at += lanes) {
        hn::Stream(hn::LoadU(wide, in + at), wide, out + at);
      }
    }
  }
  if (turns_end == bytes) return;
  for (int i = 0; i < count; ++i) {
    copy_streaming(to[i] + turns_end, from + turns_end, bytes - turns_end);
  }
}

void finish() { hwy::FlushStream(); }

using F32 = hn::ScalableTag<float>;
using Bits = hn::RebindToUnsigned<F32>;
using Half = hn::Rebind<std::uint16_t, F32>;

hn::Vec<Bits> or_nan(hn::Vec<F32> value, hn::Vec<Bits> rounded, std::uint32_t nan) {
  return hn::IfThenElse(hn::RebindMask(Bits(), hn::IsNaN(value)), hn::Set(Bits(), nan), rounded);
}

// The sums of a few neighbouring elements: one vector of memory, widened. witness() is NaN if a sum
// is (and for some infinities); without one, round<false>() is enough. clear() instead of
// initialisers: the compiler's own constructors are not built for the target.

// acc + weight * value with one rounding, also where that is no instruction.
hn::Vec<F32> multiply_add(hn::Vec<F32> acc, hn::Vec<F32> weight, hn::Vec<F32> value) {
#if HWY_NATIVE_FMA
  return hn::MulAdd(weight, value, acc);
#else
  HWY_ALIGN float sums[HWY_MAX_BYTES / sizeof(float)];
  HWY_ALIGN float weights[HWY_MAX_BYTES / sizeof(float)];
  HWY_ALIGN float values[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(acc, F32(), sums);
  hn::Store(weight, F32(), weights);
  hn::Store(value, F32(), values);
  for (std::size_t i = 0; i < hn::Lanes(F32()); ++i) {
    sums[i] = std::fma(weights[i], values[i], sums[i]);
  }
  return hn::Load(F32(), sums);
#endif
}

// How a source joins the sums.
struct Plain {
  HWY_INLINE hn::Vec<F32> operator()(hn::Vec<F32> acc, hn::Vec<F32> value) const {
    return hn::Add(acc, value);
  }
};
struct Weighted {
  float weight;
  HWY_INLINE hn::Vec<F32> operator()(hn::Vec<F32> acc, hn::Vec<F32> value) const {
    return multiply_add(acc, hn::Set(F32(), weight), value);
  }
};

// Two elements a 32-bit word, widened and rounded where they lie: nothing crosses lanes.
struct Bf16 {
  using Word = std::uint16_t;
  using Out = Bits;
  hn::Vec<F32> even, odd;

  HWY_INLINE void clear() { even = odd = hn::Zero(F32()); }
  template <class Join>
  HWY_INLINE void add(const Word* in, const Join& join) {
    const auto words = hn::LoadU(Bits(), reinterpret_cast<const std::uint32_t*>(in));
    even = join(even, hn::BitCast(F32(), hn::ShiftLeft<16>(words)));
    odd = join(odd, hn::BitCast(F32(), hn::And(words, hn::Set(Bits(), 0xffff0000))));
  }
  HWY_INLINE hn::Vec<F32> witness() const { return hn::Add(even, odd); }
  template <bool kNan>
  HWY_INLINE hn::Vec<Bits> round() const {
    const auto upper = hn::And(upper_rounded<kNan>(odd), hn::Set(Bits(), 0xffff0000));
    return hn::Or(upper, hn::ShiftRight<16>(upper_rounded<kNan>(even)));
  }

 private:
  // To nearest even, in the upper half of each word.
  template <bool kNan>
  static HWY_INLINE hn::Vec<Bits> upper_rounded(hn::Vec<F32> value) {
    const auto bits = hn::BitCast(Bits(), value);
    const auto last = hn::And(hn::ShiftRight<16>(bits), hn::Set(Bits(), 1));
    const auto rounded = hn::Add(bits, hn::Add(last, hn::Set(Bits(), 0x7fff)));
    return kNan ? or_nan(value, rounded, 0x7fff0000) : rounded;
  }
};

struct Fp16 {
  using Word = std::uint16_t;
  using Out = Half;
  hn::Vec<F32> sum;

  HWY_INLINE void clear() { sum = hn::Zero(F32()); }
  template <class Join>
  HWY_INLINE void add(const Word* in, const Join& join) {
    const hn::Rebind<hwy::float16_t, F32> half;
    const auto values = hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(in));
    sum = join(sum, hn::PromoteTo(F32(), values));
  }
  HWY_INLINE hn::Vec<F32> witness() const { return sum; }
  template <bool kNan>
  HWY_INLINE hn::Vec<Half> round() const {
    const hn::Rebind<hwy::float16_t, F32> half;
    const auto rounded = hn::BitCast(Half(), hn::DemoteTo(half, sum));
    if (!kNan) return rounded;
    return hn::TruncateTo(Half(), or_nan(sum, hn::PromoteTo(Bits(), rounded), 0x7fff));
  }
};

struct Fp32 {
  using Word = std::uint32_t;
  using Out = Bits;
  hn::Vec<F32> sum;

  HWY_INLINE void clear() { sum = hn::Zero(F32()); }
  template <class Join>
  HWY_INLINE void add(const Word* in, const Join& join) {
    sum = join(sum, hn::BitCast(F32(), hn::LoadU(Bits(), in)));
  }
  HWY_INLINE hn::Vec<F32> witness() const { return sum; }
  template <bool kNan>
  HWY_INLINE hn::Vec<Bits> round() const {
    const auto bits = hn::BitCast(Bits(), sum);
    return kNan ? or_nan(sum, bits, 0x7fffffff) : bits;
  }
};

template <class Sums>
std::int64_t lanes_of() {
  return static_cast<std::int64_t>(hn::Lanes(typename Sums::Out()) *
                                   sizeof(hn::TFromD<typename Sums::Out>) /
                                   sizeof(typename Sums::Word));
}

// Where the elements of a source are from element `i` on.
template <class Word>
struct InPlace {
  std::int64_t i;
  HWY_INLINE const Word* operator()(const std::byte* source) const {
    return reinterpret_cast<const Word*>(source) + i;
  }
};
// The last elements of a source, which fill no vector, in one.
template <class Word>
struct Padded {
  std::int64_t i;
  std::size_t bytes;
  Word* vector;
  const Word* operator()(const std::byte* source) const {
    std::memcpy(vector, source + i * static_cast<std::int64_t>(sizeof(Word)), bytes);
    return vector;
  }
};

struct Keep {
  template <class D>
  HWY_INLINE void operator()(hn::Vec<D> value, D d, hn::TFromD<D>* at) const {
    hn::StoreU(value, d, at);
  }
};
struct Stream {
  template <class D>
  HWY_INLINE void operator()(hn::Vec<D> value, D d, hn::TFromD<D>* at) const {
    hn::Stream(value, d, at);
  }
};

// The sums of kVectors neighbouring vectors: several, so that the additions of one source do not
// wait for each other. All of it is inlined, or the sums would leave the registers.
template <class Sums, int kVectors>
struct Block {
  using Word = typename Sums::Word;
  Sums sums[kVectors];

  template <class Join>
  HWY_INLINE void add(const Word* words, const Join& join) {
    const std::int64_t lanes = lanes_of<Sums>();
    if (kVectors > 1) prefetch(words, kVectors * lanes * sizeof(Word));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[v].add(words + v * lanes, join);
  }

  // The sources, each joined by its weight, then the biases.
  template <class Place>
  HWY_INLINE void add_all(const SumPiece& piece, const Place& place) {
#pragma GCC unroll 8
    for (Sums& sum : sums) sum.clear();
    if (piece.weights == nullptr) {
      for (int s = 0; s < piece.num_sources; ++s) add(place(piece.sources[s]), Plain());
    } else {
      for (int s = 0; s < piece.num_sources; ++s) {
        add(place(piece.sources[s]), Weighted{piece.weights[s]});
      }
    }
    for (const std::byte* bias : piece.bias) {
      if (bias != nullptr) add(place(bias), Plain());
    }
  }

  template <class Store>
  HWY_INLINE void store(Word* out, const Store& store_vector) const {
    auto witness = hn::Zero(F32());
#pragma GCC unroll 8
    for (const Sums& sum : sums) witness = hn::Add(witness, sum.witness());
    if (HWY_LIKELY(hn::AllFalse(F32(), hn::IsNaN(witness)))) {
      store_as<false>(out, store_vector);
    } else {
      store_as<true>(out, store_vector);
    }
  }

 private:
  template <bool kNan, class Store>
  HWY_INLINE void store_as(Word* out, const Store& store_vector) const {
    using Out = typename Sums::Out;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store_vector(sums[v].template round<kNan>(), Out(),
                   reinterpret_cast<hn::TFromD<Out>*>(out + v * lanes_of<Sums>()));
    }
  }
};

// Sums from element `i` on while there are kVectors vectors; returns where it stopped.
template <class Sums, int kVectors, class Store>
std::int64_t sum_blocks(const SumPiece& piece, std::int64_t i, const Store& store_vector) {
  using Word = typename Sums::Word;
  const std::int64_t elements = kVectors * lanes_of<Sums>();
  for (; i + elements <= piece.count; i += elements) {
    Block<Sums, kVectors> block;
    block.add_all(piece, InPlace<Word>{i});
    block.store(reinterpret_cast<Word*>(piece.out) + i, store_vector);
  }
  return i;
}

template <class Sums>
void sum(const SumPiece& piece, bool streaming) {
  using Word = typename Sums::Word;
  constexpr int kVectors = 4;
  const auto vector_bytes = lanes_of<Sums>() * static_cast<std::int64_t>(sizeof(Word));
  const bool aligned = reinterpret_cast<std::uintptr_t>(piece.out) % vector_bytes == 0;
  std::int64_t i = streaming && aligned ? sum_blocks<Sums, kVectors>(piece, 0, Stream())
                                        : sum_blocks<Sums, kVectors>(piece, 0, Keep());
  i = sum_blocks<Sums, 1>(piece, i, Keep());
  if (i == piece.count) return;
  const std::size_t rest = (piece.count - i) * sizeof(Word);
  HWY_ALIGN Word tail[HWY_MAX_BYTES / sizeof(Word)] = {};
  Block<Sums, 1> block;
  block.add_all(piece, Padded<Word>{i, rest, tail});
  block.store(tail, Keep());
  std::memcpy(piece.out + i * static_cast<std::int64_t>(sizeof(Word)), tail, rest);
}

void sum_bf16(const SumPiece& piece, bool streaming) { sum<Bf16>(piece, streaming); }
void sum_fp16(const SumPiece& piece, bool streaming) { sum<Fp16>(piece, streaming); }
void sum_fp32(const SumPiece& piece, bool streaming) { sum<Fp32>(piece, streaming); }

}  // namespace deep_ep::host::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deep_ep::host {

HWY_EXPORT(copy_streaming);
HWY_EXPORT(copy_streaming_to);
HWY_EXPORT(finish);
HWY_EXPORT(sum_bf16);
HWY_EXPORT(sum_fp16);
HWY_EXPORT(sum_fp32);

namespace {

constexpr std::int64_t kStreamingBytes = 4 << 20;

}  // namespace

Stores choose_stores(std::int64_t bytes) {
  return bytes >= kStreamingBytes ? Stores::kStreaming : Stores::kCached;
}

void copy_row(std::byte* to, const std::byte* from, std::int64_t bytes, Stores stores) {
  if (stores == Stores::kCached || DEEP_EP_PLAIN_STORES) {
    std::memcpy(to, from, bytes);
  } else {
    HWY_DYNAMIC_DISPATCH(copy_streaming)(to, from, bytes);
  }
}

void copy_row(std::byte* const* to, int count, const std::byte* from, std::int64_t bytes,
              Stores stores) {
  if (stores == Stores::kCached || DEEP_EP_PLAIN_STORES) {
    for (int i = 0; i < count; ++i) std::memcpy(to[i], from, bytes);
  } else {
    HWY_DYNAMIC_DISPATCH(copy_streaming_to)(to, count, from, bytes);
  }
}

void finish_stores() { HWY_DYNAMIC_DISPATCH(finish)(); }

void sum_piece(const SumPiece& piece, Stores stores) {
  const bool streaming = stores == Stores::kStreaming && !DEEP_EP_PLAIN_STORES;
  switch (piece.dtype) {
    case DType::kBfloat16:
      return HWY_DYNAMIC_DISPATCH(sum_bf16)(piece, streaming);
    case DType::kFloat16:
      return HWY_DYNAMIC_DISPATCH(sum_fp16)(piece, streaming);
    default:
      return HWY_DYNAMIC_DISPATCH(sum_fp32)(piece, streaming);
  }
}

}  // namespace deep_ep::host
#endif  // HWY_ONCE
