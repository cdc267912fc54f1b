#pragma once

#include "backend/cuda/internode_ll/places.cuh"

// Of few tokens several blocks share a row, since one SM reads, quantises and writes no faster.
namespace deep_ep::cuda::internode_ll {

/// How the words of a row, x and then its scales, lie in packets: three a packet, one after the
/// other. Where 128 bytes of x have a scale of a word, that comes right behind them: 33 words are
/// 11 packets, and blocks that share a row need nothing of each other.
struct RowWords {
  static constexpr int kGroupBytes = 128;
  static constexpr int kGroupPackets = 11;
  static constexpr std::uint32_t kFactor = 0x1745d175;  // p / 11 as a multiplication

  std::uint32_t factor = 0;
  int x_words = 0;

  __device__ explicit RowWords(const DispatchArgs& args)
      : factor(args.scales_beside ? kFactor : 0), x_words(static_cast<int>(args.x_bytes / 4)) {}

  __device__ int at(int packet, int word) const {
    const auto group = static_cast<int>(__umulhi(static_cast<std::uint32_t>(packet), factor));
    const bool scale =
        word == 2 && factor != 0 && packet - kGroupPackets * group == kGroupPackets - 1;
    return scale ? x_words + group : 3 * packet + word - group;
  }
  static bool fits(std::int64_t x_bytes, int num_scales) {
    return num_scales > 0 && x_bytes == std::int64_t{num_scales} * kGroupBytes;
  }
};

/// The words of a row without scales.
struct PlainWords {
  __device__ int at(int packet, int word) const { return 3 * packet + word; }
};

/// What one of the blocks that share a row does of it: groups of packets, which hold whole units of
/// 16 bytes. Where what lies does not depend on it, so ranks need not agree on how many share.
struct Slice {
  int group;
  int end;
  int group_packets;
  int group_units;

  __device__ bool leads() const { return group == 0; }
  __device__ int first_packet() const { return group * group_packets; }
  __device__ int end_packet() const { return end * group_packets; }
  __device__ int first_unit() const { return group * group_units; }
  /// Of a row of `units`.
  __device__ int end_unit(int units) const { return min(end * group_units, units); }
};

/// One of 2^shift slices.
__device__ inline Slice slice_of(int groups, int packets, int units, unsigned number, int shift) {
  return {groups * static_cast<int>(number) >> shift,
          groups * static_cast<int>(number + 1) >> shift, packets, units};
}
__device__ inline Slice slice_of(const CombineArgs& args, unsigned number, int shift) {
  return slice_of(static_cast<int>(args.places.returns.row_groups), MessageArea::kGroupPackets,
                  MessageArea::kGroupBytes / 16, number, shift);
}
__device__ inline Slice slice_of(const DispatchArgs& args, unsigned number, int shift) {
  if (args.scales_beside)
    return slice_of(args.num_scales, RowWords::kGroupPackets, RowWords::kGroupBytes / 16, number,
                    shift);
  return slice_of(static_cast<int>(args.places.messages.row_groups), MessageArea::kGroupPackets,
                  MessageArea::kGroupBytes / 16, number, shift);
}
/// Slice `number` of all that blocks take turns at: which of its row it is.
__device__ inline Slice nth_slice(const auto& args, std::int64_t number, int shift) {
  return slice_of(args, static_cast<unsigned>(number) & ((1u << shift) - 1), shift);
}

/// The scales that go with a slice: those of its values, or all.
__device__ inline int first_scale(const DispatchArgs& args, const Slice& slice) {
  return args.scales_beside ? slice.group : 0;
}
__device__ inline int end_scale(const DispatchArgs& args, const Slice& slice) {
  return args.scales_beside ? slice.end : args.num_scales;
}

/// By the launch: more blocks share a row while there are blocks without any.
template <class Args>
int find_slice_shift(const Args& args, int num_sms) {
  constexpr int kMost = 2;
  int shift = 0;
  while (shift < kMost && num_busy_blocks(args, args.num_tokens, 2 << shift) <=
                              std::int64_t{kBlocksAnSm<Args>} * num_sms)
    ++shift;
  return shift;
}

/// Which slice of which token a block has first; it goes on with those of gridDim.x slices later.
__device__ inline std::int64_t first_slice() { return first_token(); }

/// Whether no block has more than one of them.
__device__ inline bool has_slice_each(const StepArgs& args) {
  return args.num_tokens << args.slice_shift <= gridDim.x;
}

}  // namespace deep_ep::cuda::internode_ll
