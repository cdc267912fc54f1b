#pragma once

#include "backend/cuda/internode/rail_pump.cuh"

// Rows of a dispatch on their way to other nodes.
namespace deep_ep::cuda::internode {

using RowPump = SendPump<2>;

/// All of an item but x, loaded ahead of its use: words that lanes take in turns. Where those of a
/// lane come from is known for all tokens.
class Head {
 public:
  static constexpr int kWordsALane = 3;

  /// By a warp; `node` is where the items go.
  __device__ __forceinline__ Head(const DispatchArgs& args, int node)
      : words_(static_cast<int>(args.record_format.x / 4)) {
#pragma unroll
    for (int i = 0; i < kWordsALane; ++i) from_[i] = Source(args, node, i * 32 + lane_id());
  }
  /// By the warp.
  __device__ __forceinline__ void load(std::int64_t token) {
    token_ = token;
#pragma unroll
    for (int i = 0; i < kWordsALane; ++i) value_[i] = from_[i].load(token);
  }
  __device__ __forceinline__ std::int64_t token() const { return token_; }
  /// By the warp.
  __device__ __forceinline__ void store(const DispatchArgs& args, int node, std::int32_t record,
                                        std::byte* to) const {
    auto* words = reinterpret_cast<std::uint32_t*>(to);
    const int lane = lane_id();
    const std::uint32_t numbers = lane == kTokenWord    ? static_cast<std::uint32_t>(token_)
                                  : lane == kRecordWord ? static_cast<std::uint32_t>(record)
                                                        : value_[0];
    if (lane < words_) words[lane] = numbers;
#pragma unroll
    for (int i = 1; i < kWordsALane; ++i)
      if (i * 32 + lane < words_) words[i * 32 + lane] = value_[i];
#pragma unroll 1
    for (int i = kWordsALane * 32 + lane; i < words_; i += 32)
      words[i] = Source(args, node, i).load(token_);
  }

 private:
  static constexpr int kTokenWord = offsetof(plan::SourceMeta, token) / 4;
  static constexpr int kRecordWord = offsetof(plan::RecordHead, record) / 4;

  /// Of one word. Those of SourceMeta::ranks are left to who receives it.
  struct Source {
    const std::byte* at = nullptr;  // of token 0; null: the word is `value`
    std::uint32_t value = 0;
    std::uint32_t stride = 0;

    __device__ __forceinline__ Source() = default;
    __device__ Source(const DispatchArgs& args, int node, int word) {
      const plan::Topology& topology = args.rails.shape.topology;
      const plan::RecordFormat& format = args.record_format;
      std::int64_t byte = std::int64_t{word} * 4;
      // In this part of the head, of so many bytes a token?
      const auto is_of = [&](std::int64_t begin, std::int64_t bytes, const void* from,
                             std::int64_t token_stride) {
        if (byte < begin || byte >= begin + bytes) return;
        at = static_cast<const std::byte*>(from) + (byte - begin);
        stride = static_cast<std::uint32_t>(token_stride);
      };
      if (word == 0) value = static_cast<std::uint32_t>(args.rails.node);
      is_of(sizeof(plan::RecordHead), std::int64_t{4} * topology.ranks_per_node,
            args.work.send_head + topology.rank_of(node, 0), std::int64_t{4} * topology.num_ranks);
      is_of(format.topk_idx, args.format.topk_idx_bytes, args.topk_idx.data,
            args.format.topk_idx_bytes);
      is_of(format.topk_weights, args.format.topk_weights_bytes, args.topk_weights,
            args.format.topk_weights_bytes);
      byte -= format.scales;
      if (byte < 0 || byte >= args.format.scale_bytes) return;
      at = reinterpret_cast<const std::byte*>(args.scales.data +
                                              byte / 4 * args.scales.column_stride);
      stride = static_cast<std::uint32_t>(4 * args.scales.row_stride);
    }
    __device__ __forceinline__ std::uint32_t load(std::int64_t token) const {
      if (at == nullptr) return value;
      return *reinterpret_cast<const std::uint32_t*>(at + token * stride);
    }
  };

  int words_;
  std::int64_t token_ = 0;
  Source from_[kWordsALane];
  std::uint32_t value_[kWordsALane];
};

__device__ __forceinline__ Flow flow_out(const Rails& rails) {
  return {rails.state.totals + rails.shape.topology.num_ranks, false, nullptr};
}

/// By a warp that writes to rings: what it puts there.
class Outgoing {
 public:
  __device__ __forceinline__ Outgoing(const DispatchArgs& args, const MappedPeers& peers,
                                      const Role& role, ItemEnd* ends)
      : turns(args.rails, peers, args.item, flow_out(args.rails), role),
        args_(args),
        peers_(peers),
        ends_(ends),
        node_(turns.end.node(args.rails)),
        head_(args, node_) {}

  __device__ __forceinline__ bool operator()(Piece& piece, SendNote& note) {
    const Rails& rails = args_.rails;
    const ItemShape& item = args_.item;
    if (!turns.find([&](RingOut& end) { return look_out(rails, peers_, item, end); })) return false;
    const RingOut& end = turns.end;
    bool begun = false;
#pragma unroll 1
    while (true) {
      if (end.record == record_ && end.node(rails) == node_) {
        head_.store(args_, node_, record_, end.at);
        piece = {args_.x + head_.token() * args_.format.x_bytes + item.x_begin(end.piece),
                 static_cast<std::uint32_t>(item.x_size(end.piece))};
        note.to[0] = end.at + item.head_bytes;
        note.bytes = piece.bytes;
        note.end = ends_.put(end, static_cast<std::uint32_t>(item.head_bytes) + piece.bytes);
        turns.advance();
        begun = true;
      }
      // The next one's, behind it; the load stands in one place, since it is long.
      if (!begun || (end.left > 0 && end.record != record_)) load(end.node(rails), end.record);
      if (begun) return true;
    }
  }

  RingTurns<End::kOut> turns;

 private:
  /// Puts the head of a record on its way.
  __device__ __forceinline__ void load(int node, std::int32_t record) {
    if (node != node_) head_ = Head(args_, node);
    const int stride = turns.end.stride;
    known_ = node == node_ && record == record_ + stride ? known_ + 1 : 32;
    if (known_ >= 32) {
      known_ = 0;
      const std::int64_t tokens = args_.comm.record.num_tokens;
      const std::int64_t mine = record + std::int64_t{lane_id()} * stride;
      token_ = mine < tokens ? args_.work.record_tokens[node * tokens + mine] : 0;
    }
    node_ = node;
    record_ = record;
    head_.load(__shfl_sync(0xffffffff, token_, known_));
  }

  const DispatchArgs& args_;
  const MappedPeers& peers_;
  ItemEnds<RowPump> ends_;
  int node_;  // of the head
  Head head_;
  std::int32_t record_ = -1;  // of it
  std::int32_t token_ = 0;    // lane i has that of the i-th of the 32 records known at once
  int known_ = 32;            // which of these record_ is
};

}  // namespace deep_ep::cuda::internode
