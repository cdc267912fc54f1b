#include "backend/host/quantize.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/host/quantize.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "plan/numerics.hpp"

HWY_BEFORE_NAMESPACE();
namespace deep_ep::host::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using E4m3 = plan::detail::E4m3;

/// Of one group. Magnitudes of bfloat16 compare as integers; NaN is passed over.
float group_amax(const std::uint16_t* in) {
  const hn::CappedTag<std::int16_t, plan::kFp8Group> d;
  constexpr std::int16_t kInfinity = 0x7f80;
  const auto lanes = static_cast<int>(hn::Lanes(d));
  auto most = hn::Zero(d);
  for (int i = 0; i < plan::kFp8Group; i += lanes) {
    const auto bits = hn::LoadU(d, reinterpret_cast<const std::int16_t*>(in + i));
    const auto magnitude = hn::And(bits, hn::Set(d, 0x7fff));
    const auto is_nan = hn::Gt(magnitude, hn::Set(d, kInfinity));
    most = hn::Max(most, hn::IfThenZeroElse(is_nan, magnitude));
  }
  std::int16_t each[plan::kFp8Group];
  hn::StoreU(most, d, each);
  std::int16_t amax = 0;
  for (int i = 0; i < lanes; ++i) amax = std::max(amax, each[i]);
  return plan::to_float(plan::Bfloat16{static_cast<std::uint16_t>(amax)});
}

/// plan::quantize_fp8 of the values of one group.
void quantize_group(const std::uint16_t* in, float inverse, std::uint8_t* out) {
  const hn::CappedTag<float, 16> f;
  const hn::RebindToUnsigned<decltype(f)> u;
  const hn::RebindToSigned<decltype(f)> s;  // magnitudes compare as these, too
  const hn::Rebind<std::uint16_t, decltype(f)> half;
  const hn::Rebind<std::uint8_t, decltype(f)> byte;
  const auto subnormal_one = hn::Set(u, E4m3::kSubnormalOne);
  for (int i = 0; i < plan::kFp8Group; i += static_cast<int>(hn::Lanes(f))) {
    const auto wide = hn::ShiftLeft<16>(hn::PromoteTo(u, hn::LoadU(half, in + i)));
    const auto scaled = hn::Mul(hn::BitCast(f, wide), hn::Set(f, inverse));
    const auto bits = hn::BitCast(u, scaled);
    const auto sign = hn::And(hn::ShiftRight<24>(bits), hn::Set(u, 0x80));
    const auto magnitude = hn::And(bits, hn::Set(u, 0x7fffffff));
    // As E4m3::encode() does it.
    const auto small =
        hn::Sub(hn::BitCast(u, hn::Add(hn::BitCast(f, magnitude), hn::BitCast(f, subnormal_one))),
                subnormal_one);
    const auto below = [&](std::uint32_t bound) {
      return hn::RebindMask(
          u, hn::Gt(hn::Set(s, static_cast<std::int32_t>(bound)), hn::BitCast(s, magnitude)));
    };
    const auto odd = hn::And(hn::ShiftRight<E4m3::kShift>(magnitude), hn::Set(u, 1));
    const auto normal = hn::ShiftRight<E4m3::kShift>(
        hn::Add(hn::Sub(magnitude, hn::Set(u, E4m3::kRebias)),
                hn::Add(hn::Set(u, (1u << (E4m3::kShift - 1)) - 1), odd)));
    auto code = hn::IfThenElse(below(E4m3::kSmallestNormal), small, normal);
    code = hn::IfThenElse(below(0x43e00000), code, hn::Set(u, 0x7e));
    code = hn::Or(code, sign);
    code = hn::IfThenElse(below(plan::detail::kFloatInfinity + 1), code, hn::Set(u, 0x7f));
    hn::StoreU(hn::TruncateTo(byte, code), byte, out + i);
  }
}

void quantize(const std::byte* row, std::int64_t hidden,
              deep_ep::internode_ll::Quantization quantization, std::byte* out, std::byte* scales) {
  using deep_ep::internode_ll::Quantization;
  const auto* in = reinterpret_cast<const std::uint16_t*>(row);
  auto* codes = reinterpret_cast<std::uint8_t*>(out);
  const std::int64_t groups = hidden / plan::kFp8Group;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t at = g * plan::kFp8Group;
    const float amax = group_amax(in + at);
    const plan::Fp8Scale scale = quantization == Quantization::kFp8
                                     ? plan::fp8_scale(amax)
                                     : plan::fp8_power_of_two_scale(amax);
    quantize_group(in + at, scale.inverse, codes + at);
    if (quantization == Quantization::kFp8Ue8m0) {
      scales[g] = std::byte{plan::to_ue8m0(scale.scale)};
    } else {
      std::memcpy(scales + g * 4, &scale.scale, 4);
    }
  }
  if (quantization != Quantization::kFp8Ue8m0) return;
  for (std::int64_t g = groups; g % 4 != 0; ++g) scales[g] = std::byte{0};
}

}  // namespace deep_ep::host::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deep_ep::host {

HWY_EXPORT(quantize);

void quantize_row(const std::byte* row, std::int64_t hidden,
                  deep_ep::internode_ll::Quantization quantization, std::byte* out,
                  std::byte* scales) {
  HWY_DYNAMIC_DISPATCH(quantize)(row, hidden, quantization, out, scales);
}

}  // namespace deep_ep::host
#endif  // HWY_ONCE
