#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/numerics.hpp"
#include "plan/recv_arrays.hpp"
#include "protocol/control.hpp"
#include "protocol/epoch.hpp"
#include "protocol/fault.hpp"
#include "protocol/ring.hpp"
#include "protocol/ticket.hpp"
#include "protocol/wait.hpp"

// Kernels over the shared headers. Each function launches one and returns the runtime's error code;
// pointers are memory that the device can reach.
namespace deep_ep::cuda_test {

constexpr std::int64_t kTimeoutNs = 5'000'000'000;

/// A flag and the plain words that it guards.
struct Message {
  static constexpr int kWords = 16;
  protocol::EpochFlag flag;
  std::uint64_t words[kWords];
};

/// The device's end of `rounds` exchanges: round e brings words e * (i + 1), which go back tripled.
/// `wrong` counts other words and waits that failed.
int launch_echo(Message* from_host, Message* to_host, const protocol::FaultRecord* fault,
                std::uint64_t rounds, std::uint64_t* wrong);

/// Record `i` of call `c` has ring_record_words(c) words c * 1000 + i.
struct RingTest {
  static constexpr int kCalls = 40;
  static constexpr std::int64_t kRingBytes = 4096;
  protocol::EpochFlag* tail;
  protocol::EpochFlag* head;
  std::byte* data;
  const protocol::FaultRecord* fault;
  std::uint64_t* wrong;

  DEEP_EP_HD static int record_words(int call) { return 1 + call * 7 % 128; }
  DEEP_EP_HD static int records(int call) { return call * 13 % 50; }
};
int launch_ring(const RingTest& test);

/// Blocks take tickets and pass barriers, with a plain word each that all others read behind each.
struct BarrierTest {
  static constexpr int kBlocks = 8;
  static constexpr std::uint64_t kEpochs = 200;
  protocol::EpochFlag* arrived;  // [kBlocks, kBlocks]
  std::uint64_t* work;           // [kBlocks]
  protocol::TicketCounter* tickets;
  std::uint32_t* taken;  // [kBlocks]
  const protocol::FaultRecord* fault;
  std::uint64_t* wrong;
};
int launch_barrier(const BarrierTest& test);

struct WaitOutcome {
  protocol::WaitResult result;
  std::int64_t waited_ns;
};
/// Waits for an epoch that never comes.
int launch_wait(const protocol::EpochFlag* flag, const protocol::FaultRecord* fault,
                std::int64_t timeout_ns, WaitOutcome* outcome);

/// The device claims and fills the record.
int launch_fault(protocol::FaultRecord* record, std::uint32_t* claims);

/// What numerics.hpp makes of one 32-bit pattern; all bits, so that equality is exact.
struct Converted {
  std::uint32_t float_of_bf16, float_of_fp16, float_of_fp8;  // of the low bits
  std::uint32_t bf16_of_float, fp16_of_float, fp8_of_float;  // of the pattern as float
  std::uint32_t accumulated, scale, power_of_two_scale;
  std::uint32_t logfmt_code, float_of_logfmt;

  DEEP_EP_HD static Converted of(std::uint32_t pattern) {
    using namespace plan;
    const float value = bit_cast<float>(pattern);
    const float other = bit_cast<float>(pattern * 2654435761u);
    Converted out;
    out.float_of_bf16 =
        bit_cast<std::uint32_t>(to_float(Bfloat16{static_cast<std::uint16_t>(pattern)}));
    out.float_of_fp16 =
        bit_cast<std::uint32_t>(to_float(Float16{static_cast<std::uint16_t>(pattern)}));
    out.float_of_fp8 =
        bit_cast<std::uint32_t>(to_float(Float8E4m3{static_cast<std::uint8_t>(pattern)}));
    out.bf16_of_float = from_float<Bfloat16>(value).bits;
    out.fp16_of_float = from_float<Float16>(value).bits;
    out.fp8_of_float = from_float<Float8E4m3>(value).bits;
    // Which NaN a sum is differs between machines; stored results are canonical.
    out.accumulated = bit_cast<std::uint32_t>(
        from_float<float>(accumulate(multiply(value, other), value, other)));
    const float amax = fp8_amax(fp8_amax(0.0f, value), other);
    out.scale = bit_cast<std::uint32_t>(fp8_scale(amax).scale);
    out.power_of_two_scale = bit_cast<std::uint32_t>(fp8_power_of_two_scale(amax).scale);
    // One of two magnitudes begins the range, the other one ends it; every code is tried as well.
    const float one = to_float(Bfloat16{static_cast<std::uint16_t>(pattern)});
    const float two = to_float(Bfloat16{static_cast<std::uint16_t>(pattern * 2654435761u >> 16)});
    const float none = bit_cast<float>(detail::kFloatInfinity);
    const LogFmtScale range = logfmt_scale(logfmt_range(logfmt_amax(logfmt_amax(0.0f, one), two),
                                                        logfmt_amin(logfmt_amin(none, one), two)));
    out.logfmt_code = quantize_logfmt(value, range);
    out.float_of_logfmt = bit_cast<std::uint32_t>(dequantize_logfmt(pattern % 1024, range));
    return out;
  }
  DEEP_EP_HD friend bool operator==(const Converted& a, const Converted& b) {
    return a.float_of_bf16 == b.float_of_bf16 && a.float_of_fp16 == b.float_of_fp16 &&
           a.float_of_fp8 == b.float_of_fp8 && a.bf16_of_float == b.bf16_of_float &&
           a.fp16_of_float == b.fp16_of_float && a.fp8_of_float == b.fp8_of_float &&
           a.accumulated == b.accumulated && a.scale == b.scale &&
           a.power_of_two_scale == b.power_of_two_scale && a.logfmt_code == b.logfmt_code &&
           a.float_of_logfmt == b.float_of_logfmt;
  }
};
/// out[i] = Converted::of(first + i * step)
int launch_convert(std::uint32_t first, std::uint32_t step, std::uint32_t count, Converted* out);

/// How often the hardware's conversions, with which sums are made, differ from plan/numerics: over
/// all 2^32 floats on the way out, all 2^16 patterns on the way in (a NaN may be any).
struct SumConversions {
  unsigned long long narrow_bf16, narrow_fp16, widen_bf16, widen_fp16;
};
int launch_sum_conversions(SumConversions* wrong);

/// How often scales that are found without a branch differ from plan/numerics, over all floats that
/// can be the largest magnitude of a group: exact ones, and powers of two.
struct Scales {
  unsigned long long exact, powers;
};
int launch_scales(Scales* wrong);

/// Sizes and places as the device computes them.
struct Carved {
  std::int64_t control_bytes;
  std::int64_t ring_data_offset;
  std::int64_t recv_bytes;
  std::int64_t recv_src_idx_offset;
  std::int64_t channel_begin;
  std::int64_t rows_begin;

  DEEP_EP_HD static Carved at(std::byte* base, const std::int32_t* prefix);
};
int launch_carve(std::byte* base, const std::int32_t* prefix, Carved* out);
/// The same on the host.
Carved carve_on_host(std::byte* base, const std::int32_t* prefix);

}  // namespace deep_ep::cuda_test
