#pragma once

#include "backend/cuda/internode_ll/places.cuh"

// Of few tokens several blocks share a row of a combine, since one SM reads and writes no faster.
namespace deep_ep::cuda::internode_ll {

/// What one of the blocks that share a row does of it: groups of four packets, three units of 16
/// bytes each. Where what lies does not depend on it, so ranks need not agree on how many share.
struct Slice {
  int group;
  int end;

  __device__ int first_packet() const { return group * MessageArea::kGroupPackets; }
  __device__ int end_packet() const { return end * MessageArea::kGroupPackets; }
  __device__ int first_unit() const { return group * (MessageArea::kGroupBytes / 16); }
  /// Of a row of `units`.
  __device__ int end_unit(int units) const {
    return min(end * (MessageArea::kGroupBytes / 16), units);
  }
};

/// One of 2^shift slices.
__device__ inline Slice slice_of(const CombineArgs& args, unsigned number, int shift) {
  const auto groups = static_cast<int>(args.places.returns.row_groups);
  return {groups * static_cast<int>(number) >> shift,
          groups * static_cast<int>(number + 1) >> shift};
}

/// By the launch: more blocks share a row while there are blocks without any.
template <class Rows, class Args>
int find_slice_shift(const Args& args, int num_sms) {
  constexpr int kMost = 2;
  int shift = 0;
  while (Rows::kSlices && shift < kMost &&
         num_busy_blocks(args, args.num_tokens, 2 << shift) <=
             std::int64_t{kBlocksAnSm<Args>} * num_sms)
    ++shift;
  return shift;
}

/// Which slice of which token a block has first; it goes on with those of gridDim.x slices later.
__device__ inline std::int64_t first_slice() { return first_token(); }

/// Whether no block has more than one of them.
__device__ inline bool has_slice_each(const CombineArgs& args) {
  return args.num_tokens << args.slice_shift <= gridDim.x;
}

}  // namespace deep_ep::cuda::internode_ll
