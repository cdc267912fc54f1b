#include "backend/host/wire.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/host/wire.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "backend/host/quantize.hpp"
#include "plan/numerics.hpp"

HWY_BEFORE_NAMESPACE();
namespace deep_ep::host::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

constexpr int kGroup = plan::kWireGroup;

plan::LogFmtRange range_of(const std::uint16_t* in) {
  const hn::CappedTag<std::int16_t, kGroup> d;
  constexpr std::int16_t kInfinity = 0x7f80;
  constexpr std::int16_t kSmallest = 0x0080;
  const auto lanes = static_cast<int>(hn::Lanes(d));
  auto most = hn::Zero(d);
  auto least = hn::Set(d, kInfinity);
  for (int i = 0; i < kGroup; i += lanes) {
    const auto bits = hn::LoadU(d, reinterpret_cast<const std::int16_t*>(in + i));
    const auto magnitude = hn::And(bits, hn::Set(d, 0x7fff));
    const auto counts = hn::And(hn::Gt(hn::Set(d, kInfinity), magnitude),
                                hn::Gt(magnitude, hn::Set(d, kSmallest - 1)));
    most = hn::Max(most, hn::IfThenElseZero(counts, magnitude));
    least = hn::Min(least, hn::IfThenElse(counts, magnitude, hn::Set(d, kInfinity)));
  }
  const auto value = [](std::int16_t bits) {
    return plan::to_float(plan::Bfloat16{static_cast<std::uint16_t>(bits)});
  };
  return plan::logfmt_range(value(hn::GetLane(hn::MaxOfLanes(d, most))),
                            value(hn::GetLane(hn::MinOfLanes(d, least))));
}

using F32 = hn::CappedTag<float, 16>;
using Bits = hn::RebindToUnsigned<F32>;
using Signed = hn::RebindToSigned<F32>;
using Half = hn::Rebind<std::uint16_t, F32>;
using Byte = hn::Rebind<std::uint8_t, F32>;

/// The codes of a group, in bytes.
struct Codes {
  std::uint8_t low[kGroup];
  std::uint8_t high[kGroup];  // two bits
};

#if HWY_NATIVE_FMA

/// Of numbers that are positive and normal.
hn::Vec<F32> log2_of_mantissa(hn::Vec<Signed> magnitude) {
  const F32 f;
  const auto mantissa = hn::And(magnitude, hn::Set(Signed(), 0x007fffff));
  const auto one = hn::BitCast(f, hn::Or(mantissa, hn::Set(Signed(), 0x3f800000)));
  const auto fraction = hn::Sub(one, hn::Set(f, 1.0f));
  auto sum = hn::Set(f, plan::detail::log2_factor(6));
#pragma GCC unroll 8
  for (int i = 5; i >= 0; --i)
    sum = hn::MulAdd(sum, fraction, hn::Set(f, plan::detail::log2_factor(i)));
  return hn::Mul(fraction, sum);
}

/// plan::quantize_logfmt of the values of one group.
void quantize_group(const std::uint16_t* in, const plan::LogFmtScale& scale, Codes& codes) {
  const Signed s;
  const F32 f;
  constexpr auto kOctave = static_cast<std::int32_t>(plan::detail::kSmallestNormal);
  constexpr auto kSteps = static_cast<float>(plan::kLogFmtSteps);
  constexpr auto kSign = static_cast<std::int32_t>(plan::kLogFmtSign);
  const auto begin = static_cast<std::int32_t>(scale.begin);
  // The first magnitude that is no zero.
  const auto first = hn::Set(s, std::max(kOctave, begin - kOctave));
  for (int i = 0; i < kGroup; i += static_cast<int>(hn::Lanes(f))) {
    const auto bits = hn::ShiftLeft<16>(hn::PromoteTo(Bits(), hn::LoadU(Half(), in + i)));
    const auto magnitude = hn::BitCast(s, hn::And(bits, hn::Set(Bits(), 0x7fffffff)));
    const auto octaves =
        hn::ConvertTo(f, hn::Sub(hn::ShiftRight<23>(magnitude), hn::Set(s, begin >> 23)));
    const auto log2 =
        hn::Add(octaves, hn::Add(log2_of_mantissa(magnitude), hn::Set(f, -scale.log2_begin)));
    auto steps = hn::Mul(log2, hn::Set(f, scale.inverse));
    steps = hn::Min(hn::Max(steps, hn::Zero(f)), hn::Set(f, kSteps));
    const auto whole =
        hn::And(hn::BitCast(s, hn::Add(steps, hn::Set(f, 8388608.0f))), hn::Set(s, 0x1ff));
    const auto sign = hn::And(hn::ShiftRight<22>(hn::BitCast(s, bits)), hn::Set(s, kSign));
    auto code = hn::Or(hn::Add(whole, hn::Set(s, 1)), sign);
    code = hn::IfThenZeroElse(hn::Lt(magnitude, first), code);
    constexpr auto kInfinity = static_cast<std::int32_t>(plan::detail::kFloatInfinity);
    code = hn::IfThenElse(hn::Lt(magnitude, hn::Set(s, kInfinity)), code, hn::Set(s, kSign));
    const auto low = hn::BitCast(Bits(), hn::And(code, hn::Set(s, 0xff)));
    const auto high = hn::BitCast(Bits(), hn::ShiftRight<8>(code));
    hn::StoreU(hn::TruncateTo(Byte(), low), Byte(), codes.low + i);
    hn::StoreU(hn::TruncateTo(Byte(), high), Byte(), codes.high + i);
  }
}

/// Adds plan::dequantize_logfmt of the codes of one group.
void add_group(const Codes& codes, const plan::LogFmtScale& scale, float* sums) {
  const Signed s;
  const F32 f;
  const auto exponent = static_cast<std::int32_t>((scale.begin & 0x7f800000u) - 0x3f800000u);
  for (int i = 0; i < kGroup; i += static_cast<int>(hn::Lanes(f))) {
    const auto low = hn::PromoteTo(s, hn::LoadU(Byte(), codes.low + i));
    const auto high = hn::PromoteTo(s, hn::LoadU(Byte(), codes.high + i));
    const auto code = hn::Or(low, hn::ShiftLeft<8>(high));
    const auto number = hn::And(code, hn::Set(s, 0x1ff));
    const auto steps = hn::ConvertTo(f, hn::Sub(number, hn::Set(s, 1)));
    const auto log2 = hn::MulAdd(steps, hn::Set(f, scale.step), hn::Set(f, scale.log2_begin));
    const auto octaves = hn::ConvertTo(s, log2);
    const auto fraction = hn::Sub(log2, hn::ConvertTo(f, octaves));
    auto mantissa = hn::Set(f, plan::detail::exp2_factor(4));
#pragma GCC unroll 8
    for (int k = 3; k >= 0; --k)
      mantissa = hn::MulAdd(mantissa, fraction, hn::Set(f, plan::detail::exp2_factor(k)));
    mantissa = hn::MulAdd(mantissa, fraction, hn::Set(f, 1.0f));
    auto bits = hn::Add(hn::BitCast(s, mantissa),
                        hn::Add(hn::ShiftLeft<23>(octaves), hn::Set(s, exponent)));
    bits = hn::Or(bits, hn::ShiftLeft<22>(hn::And(code, hn::Set(s, 0x200))));
    // Codes that are no number of steps: zero, and what is not finite.
    const auto other = hn::IfThenElseZero(hn::Gt(code, hn::Zero(s)), hn::Set(s, 0x7fffffff));
    bits = hn::IfThenElse(hn::Gt(number, hn::Zero(s)), bits, other);
    hn::StoreU(hn::Add(hn::LoadU(f, sums + i), hn::BitCast(f, bits)), f, sums + i);
  }
}

#else  // one value at a time: without the instruction a merged multiplication and addition is slow

void quantize_group(const std::uint16_t* in, const plan::LogFmtScale& scale, Codes& codes) {
  for (int i = 0; i < kGroup; ++i) {
    const std::uint32_t code = plan::quantize_logfmt(plan::to_float(plan::Bfloat16{in[i]}), scale);
    codes.low[i] = static_cast<std::uint8_t>(code);
    codes.high[i] = static_cast<std::uint8_t>(code >> 8);
  }
}

void add_group(const Codes& codes, const plan::LogFmtScale& scale, float* sums) {
  for (int i = 0; i < kGroup; ++i) {
    const std::uint32_t code = codes.low[i] | std::uint32_t{codes.high[i]} << 8;
    sums[i] = plan::add(sums[i], plan::dequantize_logfmt(code, scale));
  }
}

#endif

void encode_logfmt(const std::byte* row, std::int64_t hidden, std::byte* out) {
  const auto wire = plan::WireRow::of(plan::WireFormat::kLogFmt, hidden);
  const auto* in = reinterpret_cast<const std::uint16_t*>(row);
  Codes codes;
  for (std::int64_t at = 0; at < hidden; at += kGroup) {
    const plan::LogFmtRange range = range_of(in + at);
    quantize_group(in + at, plan::logfmt_scale(range), codes);
    std::memcpy(out + at, codes.low, sizeof codes.low);
    // Four times two bits from four bytes.
    auto* high = reinterpret_cast<std::uint8_t*>(out + wire.high + at / 4);
    for (int i = 0; i < kGroup; i += 4) {
      std::uint32_t four = 0;
      std::memcpy(&four, codes.high + i, sizeof four);
      high[i / 4] = static_cast<std::uint8_t>(four | four >> 6 | four >> 12 | four >> 18);
    }
    std::memcpy(out + wire.words + at / kGroup * 4, &range, sizeof range);
  }
}

void add_logfmt(const std::byte* row, std::int64_t hidden, std::int64_t at, float* sums) {
  const auto wire = plan::WireRow::of(plan::WireFormat::kLogFmt, hidden);
  plan::LogFmtRange range;
  std::memcpy(&range, row + wire.words + at / kGroup * 4, sizeof range);
  Codes codes;
  std::memcpy(codes.low, row + at, sizeof codes.low);
  const auto* high = reinterpret_cast<const std::uint8_t*>(row + wire.high + at / 4);
  for (int i = 0; i < kGroup; i += 4) {
    const std::uint32_t byte = high[i / 4];
    const std::uint32_t four = (byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303;
    std::memcpy(codes.high + i, &four, sizeof four);
  }
  add_group(codes, plan::logfmt_scale(range), sums);
}

/// Adds plan::dequantize_fp8 of the codes of one group.
void add_fp8(const std::byte* row, std::int64_t hidden, std::int64_t at, float* sums) {
  using E4m3 = plan::detail::E4m3;
  const F32 f;
  const Signed s;
  const auto wire = plan::WireRow::of(plan::WireFormat::kFp8, hidden);
  float scale = 0.0f;
  std::memcpy(&scale, row + wire.words + at / kGroup * 4, sizeof scale);
  const auto* codes = reinterpret_cast<const std::uint8_t*>(row + at);
  const auto one = hn::Set(s, static_cast<std::int32_t>(E4m3::kSubnormalOne));
  for (int i = 0; i < kGroup; i += static_cast<int>(hn::Lanes(f))) {
    const auto all = hn::PromoteTo(s, hn::LoadU(Byte(), codes + i));
    const auto code = hn::And(all, hn::Set(s, 0x7f));
    // As E4m3::decode() does it.
    const auto small =
        hn::BitCast(s, hn::Sub(hn::BitCast(f, hn::Or(one, code)), hn::BitCast(f, one)));
    const auto normal = hn::Add(hn::ShiftLeft<E4m3::kShift>(code),
                                hn::Set(s, static_cast<std::int32_t>(E4m3::kRebias)));
    auto bits = hn::IfThenElse(hn::Lt(code, hn::Set(s, 8)), small, normal);
    bits = hn::IfThenElse(hn::Eq(code, hn::Set(s, 0x7f)), hn::Set(s, 0x7fffffff), bits);
    bits = hn::Or(bits, hn::ShiftLeft<24>(hn::And(all, hn::Set(s, 0x80))));
    const auto value = hn::Mul(hn::BitCast(f, bits), hn::Set(f, scale));
    hn::StoreU(hn::Add(hn::LoadU(f, sums + i), value), f, sums + i);
  }
}

/// plan::from_float<Bfloat16>
void round_group(const float* sums, std::uint16_t* out) {
  for (int i = 0; i < kGroup; i += static_cast<int>(hn::Lanes(F32()))) {
    const auto sum = hn::LoadU(F32(), sums + i);
    const auto bits = hn::BitCast(Bits(), sum);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(Bits(), 1));
    auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(Bits(), 0x7fff))));
    rounded =
        hn::IfThenElse(hn::RebindMask(Bits(), hn::IsNaN(sum)), hn::Set(Bits(), 0x7fff), rounded);
    hn::StoreU(hn::TruncateTo(Half(), rounded), Half(), out + i);
  }
}

void sum_rows(const WireSum& sum) {
  auto* out = reinterpret_cast<std::uint16_t*>(sum.out);
  for (std::int64_t at = 0; at < sum.hidden; at += kGroup) {
    float sums[kGroup] = {};
    for (int i = 0; i < sum.num_rows; ++i)
      (sum.format == plan::WireFormat::kLogFmt ? add_logfmt : add_fp8)(sum.rows[i], sum.hidden, at,
                                                                       sums);
    round_group(sums, out + at);
  }
}

}  // namespace deep_ep::host::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deep_ep::host {

HWY_EXPORT(encode_logfmt);
HWY_EXPORT(sum_rows);

void encode_row(plan::WireFormat format, const std::byte* row, std::int64_t hidden,
                std::byte* out) {
  if (format == plan::WireFormat::kLogFmt)
    return HWY_DYNAMIC_DISPATCH(encode_logfmt)(row, hidden, out);
  quantize_row(row, hidden, deep_ep::internode_ll::Quantization::kFp8, out,
               out + plan::WireRow::of(format, hidden).words);
}

void sum_wire_rows(const WireSum& sum) { HWY_DYNAMIC_DISPATCH(sum_rows)(sum); }

}  // namespace deep_ep::host
#endif  // HWY_ONCE
