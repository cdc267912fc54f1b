#include "backend/host/rows.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/host/rows.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cstring>

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
  std::int64_t i = 0;
  for (; i < bytes && reinterpret_cast<std::uintptr_t>(out + i) % lanes != 0; i += few) {
    hn::Stream(hn::LoadU(narrow, in + i), narrow, out + i);
  }
  for (; i + lanes <= bytes; i += lanes) hn::Stream(hn::LoadU(wide, in + i), wide, out + i);
  for (; i < bytes; i += few) hn::Stream(hn::LoadU(narrow, in + i), narrow, out + i);
}

void finish() { hwy::FlushStream(); }

using F32 = hn::ScalableTag<float>;
using Bits = hn::RebindToUnsigned<F32>;
using Half = hn::Rebind<std::uint16_t, F32>;

// Loads and stores of one vector of elements as fp32; `stream` needs an aligned target.
struct Bf16 {
  using Word = std::uint16_t;
  static hn::Vec<F32> load(const Word* in) {
    return hn::BitCast(F32(), hn::ShiftLeft<16>(hn::PromoteTo(Bits(), hn::LoadU(Half(), in))));
  }
  static hn::Vec<Half> round(hn::Vec<F32> value) {
    const auto bits = hn::BitCast(Bits(), value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(Bits(), 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(Bits(), 0x7fff))));
    const auto is_nan = hn::RebindMask(Bits(), hn::IsNaN(value));
    return hn::TruncateTo(Half(), hn::IfThenElse(is_nan, hn::Set(Bits(), 0x7fff), rounded));
  }
};
struct Fp16 {
  using Word = std::uint16_t;
  static hn::Vec<F32> load(const Word* in) {
    const hn::Rebind<hwy::float16_t, F32> half;
    return hn::PromoteTo(F32(), hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(in)));
  }
  static hn::Vec<Half> round(hn::Vec<F32> value) {
    const hn::Rebind<hwy::float16_t, F32> half;
    const auto bits = hn::PromoteTo(Bits(), hn::BitCast(Half(), hn::DemoteTo(half, value)));
    const auto is_nan = hn::RebindMask(Bits(), hn::IsNaN(value));
    return hn::TruncateTo(Half(), hn::IfThenElse(is_nan, hn::Set(Bits(), 0x7fff), bits));
  }
};
struct Fp32 {
  using Word = std::uint32_t;
  static hn::Vec<F32> load(const Word* in) { return hn::BitCast(F32(), hn::LoadU(Bits(), in)); }
  static hn::Vec<Bits> round(hn::Vec<F32> value) {
    const auto is_nan = hn::RebindMask(Bits(), hn::IsNaN(value));
    return hn::IfThenElse(is_nan, hn::Set(Bits(), 0x7fffffff), hn::BitCast(Bits(), value));
  }
};

// Sums kVectors vectors from element `i` on: several, so that the additions of one source do not
// wait for each other.
template <class Element, int kVectors, class Store>
void sum_at(const SumPiece& piece, std::int64_t i, Store&& store) {
  using Word = typename Element::Word;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F32()));
  hn::Vec<F32> sums[kVectors];
#pragma GCC unroll 8
  for (auto& sum : sums) sum = hn::Zero(F32());
  const auto add = [&](const std::byte* source) {
    const Word* words = reinterpret_cast<const Word*>(source) + i;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = hn::Add(sums[v], Element::load(words + v * lanes));
    }
  };
  for (int s = 0; s < piece.num_sources; ++s) add(piece.sources[s]);
  for (const std::byte* bias : piece.bias) {
    if (bias != nullptr) add(bias);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store(Element::round(sums[v]), i + v * lanes);
}

template <class Element>
void sum(const SumPiece& piece, bool streaming) {
  using Word = typename Element::Word;
  constexpr int kVectors = 4;
  const hn::DFromV<decltype(Element::round(hn::Zero(F32())))> words;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F32()));
  auto* out = reinterpret_cast<Word*>(piece.out);
  const bool aligned = reinterpret_cast<std::uintptr_t>(out) % (lanes * sizeof(Word)) == 0;
  const auto stream = [&](auto value, std::int64_t at) { hn::Stream(value, words, out + at); };
  const auto keep = [&](auto value, std::int64_t at) { hn::StoreU(value, words, out + at); };
  std::int64_t i = 0;
  if (streaming && aligned) {
    for (; i + kVectors * lanes <= piece.count; i += kVectors * lanes) {
      sum_at<Element, kVectors>(piece, i, stream);
    }
  }
  for (; i + kVectors * lanes <= piece.count; i += kVectors * lanes) {
    sum_at<Element, kVectors>(piece, i, keep);
  }
  for (; i + lanes <= piece.count; i += lanes) sum_at<Element, 1>(piece, i, keep);
  if (i == piece.count) return;
  // The last elements: through full vectors on the stack.
  const std::int64_t rest = piece.count - i;
  HWY_ALIGN Word tail[HWY_MAX_BYTES / sizeof(Word)] = {};
  auto total = hn::Zero(F32());
  const auto add = [&](const std::byte* source) {
    std::memcpy(tail, source + i * static_cast<std::int64_t>(sizeof(Word)), rest * sizeof(Word));
    total = hn::Add(total, Element::load(tail));
  };
  for (int s = 0; s < piece.num_sources; ++s) add(piece.sources[s]);
  for (const std::byte* bias : piece.bias) {
    if (bias != nullptr) add(bias);
  }
  hn::StoreU(Element::round(total), words, tail);
  std::memcpy(out + i, tail, rest * sizeof(Word));
}

void sum_bf16(const SumPiece& piece, bool streaming) { sum<Bf16>(piece, streaming); }
void sum_fp16(const SumPiece& piece, bool streaming) { sum<Fp16>(piece, streaming); }
void sum_fp32(const SumPiece& piece, bool streaming) { sum<Fp32>(piece, streaming); }

}  // namespace deep_ep::host::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deep_ep::host {

HWY_EXPORT(copy_streaming);
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
