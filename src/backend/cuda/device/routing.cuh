#pragma once

#include "backend/cuda/arrays.hpp"
#include "backend/cuda/device/waiting.cuh"
#include "plan/layout.hpp"

// What notify does with the caller's tokens, on all blocks: which of the tokens of a column (a
// rank, a node) each one is, and whether its ids fit.
namespace deep_ep::cuda {

constexpr int kGroupsAPart = kTokensPerCount / 32;  // of 32 tokens, whose bits a word holds

/// Rows [N, columns] are parted by tokens; warps tell each other the counts of their parts.
struct PartTable {
  std::uint64_t* counts;  // [parts, columns] of earlier kernels, tagged with their epoch
  int columns;
  std::int64_t tokens;

  __device__ std::int64_t parts() const {
    return tokens == 0 ? 1 : (tokens + kTokensPerCount - 1) / kTokensPerCount;
  }
};

/// What a warp knows of one column in one part: tokens [begin, end), of which those before it have
/// `before` rows.
struct Part {
  std::int64_t begin;
  std::int64_t end;
  std::int32_t before;
  std::uint32_t bits[kGroupsAPart];

  /// Rows among the tokens before `token`.
  __device__ std::int32_t rows_until(std::int64_t token) const {
    std::int32_t sum = before;
    const auto all = static_cast<int>(token - begin);
#pragma unroll
    for (int group = 0; group < kGroupsAPart; ++group) {
      const int left = all - group * 32;
      const std::uint32_t mask = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
      sum += __popc(bits[group] & mask);
    }
    return sum;
  }
};

/// A count and the kernel that it is of, in one word that is read and written whole.
__device__ inline std::uint64_t tagged(std::uint64_t epoch, std::uint32_t count) {
  return epoch << 32 | count;
}

/// By a warp: how many of the tokens before part `part` are of `column`. Parts are counted by warps
/// of this or an earlier turn, which never wait for a later part.
__device__ inline std::int32_t count_before(const PartTable& table, std::int64_t part, int column,
                                            std::uint64_t epoch) {
  std::int32_t sum = 0;
  for (std::int64_t i = threadIdx.x % 32; i < part; i += 32) {
    const std::uint64_t* word = table.counts + i * table.columns + column;
    std::uint64_t value;
    // The word holds all that there is to know, so its order with other words does not matter.
    while ((value = protocol::load_relaxed(word)) >> 32 != (epoch & 0xffffffff)) {
    }
    sum += static_cast<std::int32_t>(value);
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  return sum;
}

/// By a warp: one part of one column. goes(token) says whether a token is of it; place(token,
/// position) is called for each with its position or -1. Returns what the rest needs to know.
template <class Goes, class Place>
__device__ Part place_part(const PartTable& table, std::int64_t number, int column,
                           std::uint64_t epoch, Goes&& goes, Place&& place) {
  Part part;
  part.begin = number * kTokensPerCount;
  part.end =
      part.begin + kTokensPerCount < table.tokens ? part.begin + kTokensPerCount : table.tokens;
  const int lane = threadIdx.x % 32;
  std::int32_t count = 0;
#pragma unroll
  for (int group = 0; group < kGroupsAPart; ++group) {
    const std::int64_t token = part.begin + group * 32 + lane;
    part.bits[group] = __ballot_sync(0xffffffff, token < part.end && goes(token));
    count += __popc(part.bits[group]);
  }
  if (lane == 0)
    protocol::store_relaxed(table.counts + number * table.columns + column, tagged(epoch, count));
  part.before = count_before(table, number, column, epoch);
  std::int32_t at = part.before;
#pragma unroll
  for (int group = 0; group < kGroupsAPart; ++group) {
    const std::int64_t token = part.begin + group * 32 + lane;
    const bool here = (part.bits[group] >> lane & 1) != 0;
    if (token < part.end)
      place(token, here ? at + __popc(part.bits[group] & ((1u << lane) - 1)) : -1);
    at += __popc(part.bits[group]);
  }
  return part;
}

/// By the same warp: `prefix` [channels], rows of the channels up to each one.
__device__ inline void write_prefix(const Part& part, std::int64_t tokens, int channels,
                                    std::int32_t* prefix) {
  // Each boundary belongs to the part that ends at it or behind it; 0 to the first.
  const std::int64_t first =
      part.begin == 0 ? 0 : ((part.begin + 1) * channels + tokens - 1) / tokens - 1;
  for (auto c = static_cast<int>(first + threadIdx.x % 32); c < channels; c += 32) {
    const std::int64_t last = plan::channel_begin(tokens, c + 1, channels);
    if (last > part.end) return;
    prefix[c] = part.rows_until(last);
  }
}

__device__ __noinline__ inline void raise_bad_id(const Comm& comm, std::int64_t entry,
                                                 std::int64_t id, int num_ranks) {
  const protocol::CallRecord& record = comm.record;
  const bool known = id >= 0 && id < record.num_experts;
  raise_invalid(comm, known ? Finding::kNotInRank : Finding::kBadExpert, entry / record.num_topk,
                entry % record.num_topk, id,
                known ? id / (record.num_experts / num_ranks) : std::int64_t{record.num_experts});
}

/// By all threads of `blocks` blocks: ids in range, and in is_token_in_rank [N, num_ranks].
__device__ inline void check_ids(const Comm& comm, const Ids& topk_idx,
                                 const bool* is_token_in_rank, int num_ranks, int blocks) {
  if (topk_idx.data == nullptr) return;
  constexpr int kTogether = 4;  // loads under way at once
  const protocol::CallRecord& record = comm.record;
  const std::uint32_t experts = record.num_experts;
  const std::uint32_t local_experts = experts / num_ranks;
  const std::uint32_t topk = record.num_topk;
  // Below 2^31: validated with the call.
  const auto count = static_cast<std::uint32_t>(record.num_tokens * topk);
  const std::uint32_t step = blocks * blockDim.x;
  for (std::uint32_t base = blockIdx.x * blockDim.x + threadIdx.x; base < count;
       base += step * kTogether) {
    std::int64_t ids[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      ids[i] = base + i * step < count ? topk_idx[base + i * step] : -1;
    bool in_rank[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const bool known = ids[i] >= 0 && ids[i] < experts;
      const std::uint32_t token = (base + i * step) / topk;
      in_rank[i] = ids[i] == -1 ||
                   (known && is_token_in_rank[std::int64_t{token} * num_ranks +
                                              static_cast<std::uint32_t>(ids[i]) / local_experts]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (!in_rank[i]) raise_bad_id(comm, base + i * step, ids[i], num_ranks);
    }
  }
}

}  // namespace deep_ep::cuda
