#pragma once

#include "backend/cuda/internode/node_sums.cuh"

// What a token's rank adds in a combine: items of other nodes, the sum of its own, biases.
namespace deep_ep::cuda::internode {

// Functions that are not inlined are static: so the compiler knows how many registers their kernel
// leaves them.

// 16-byte loads of a lane that are under way at once: a row of 7168 BF16 values in seven turns.
constexpr int kAddUnroll = 4;

/// What a part of a token's sum is of: `addends` listed ones, items and then biases, and in place
/// `own_at` among them the sum of `rows` listed rows of this node, or -1.
struct Addends {
  int items;
  int addends;
  int own_at;
  int rows;
};

/// By a lane: the kSteps times 16 bytes that are `at` in a part, which begins at `begin` in the
/// row. The first item is loaded ahead of all sums, so that its bytes and those of this node's rows
/// are under way at once.
template <class T, int kSteps>
__device__ void add_columns(const Sources& sources, const Addends& parts, std::int64_t begin,
                            int at, std::byte* out) {
  uint4 bytes[kSteps];
  const auto load = [&](const std::byte* from) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      bytes[i] = *reinterpret_cast<const uint4*>(from + at + i * 512);
  };
  if (parts.addends > 0) load(sources.addends[0]);
  uint4 own[kSteps];
  if (parts.own_at >= 0) {
    Sum16<T> sums[kSteps];
    for (int row = 0; row < parts.rows; ++row)
      add_rows<T, kSteps, 1>(sums, sources.rows + row, begin + at);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) own[i] = sums[i].round();
  }
  Sum16<T> sums[kSteps];
  const auto add = [&](const uint4(&more)[kSteps]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) sums[i].add(more[i]);
  };
#pragma unroll 1
  for (int i = 0; i <= parts.addends; ++i) {
    if (i == parts.own_at) add(own);
    if (i == parts.addends) break;
    if (i > 0) load(sources.addends[i]);
    add(bytes);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) *reinterpret_cast<uint4*>(out + at + i * 512) = sums[i].round();
}

/// By a warp: the `bytes` bytes of a part. Not inlined, as sum_part().
template <class T>
static __device__ __noinline__ void add_part(const Sources& sources, Addends parts,
                                             std::int64_t begin, int bytes, std::byte* out) {
  if (parts.rows <= 1 && parts.addends <= 1) {
    sum_pair<T>(parts.rows == 1 ? sources.rows[0] + begin : nullptr,
                parts.addends == 1 ? sources.addends[0] : nullptr, bytes, out);
    return;
  }
  for_each_column<kAddUnroll>(bytes, [&](int at, auto steps) {
    add_columns<T, steps.kCount>(sources, parts, begin, at, out);
  });
}

/// By a warp: a part of a token's sum.
template <class T>
__device__ void add_piece(const CombineArgs& args, const Sources& sources, const Addends& parts,
                          std::int64_t token, int piece) {
  const std::int64_t begin = args.item.x_begin(piece);
  add_part<T>(sources, parts, begin, static_cast<int>(args.item.x_size(piece)),
              args.combined_x + token * args.format.x_bytes + begin);
  if (piece > 0 || args.combined_topk_weights == nullptr) return;
  const int topk = args.comm.record.num_topk;
  for (int k = lane_id(); k < topk; k += 32) {
    float sum = 0.0f;
    for (int i = 0; i <= parts.items; ++i) {
      if (i == parts.own_at) sum = plan::add(sum, sum_weight(sources, parts.rows, k));
      if (i < parts.items) sum = plan::add(sum, sources.item_weights[i][k]);
    }
    args.combined_topk_weights[token * topk + k] = plan::from_float<float>(sum);
  }
}

}  // namespace deep_ep::cuda::internode
