#pragma once

#include "backend/cuda/internode/node_sums.cuh"
#include "backend/cuda/internode/rail_pump.cuh"

// A node's sums of a combine on their way to the tokens' ranks.
namespace deep_ep::cuda::internode {

using SumPump = SendPump<3>;

// 16-byte loads of a lane that are under way at once: a row of 7168 BF16 values in four turns.
constexpr int kSumUnroll = 7;

/// By a warp: the `bytes` bytes from `begin` on of a record's sum over `rows` listed rows, or zeros
/// if there are none. Not inlined, so that the compiler keeps registers for this loop, not for what
/// is around it.
template <class T>
static __device__ __noinline__ void sum_part(const Sources& sources, int rows, std::int64_t begin,
                                             int bytes, std::byte* to) {
  for_each_column<kSumUnroll>(bytes, [&](int at, auto steps) {
    Sum16<T> sums[steps.kCount];
#pragma unroll 1
    for (int row = 0; row < rows; ++row)
      add_rows<T, steps.kCount, 1>(sums, sources.rows + row, begin + at);
#pragma unroll
    for (int i = 0; i < steps.kCount; ++i)
      *reinterpret_cast<uint4*>(to + at + i * 512) = sums[i].round();
  });
}

/// Of a rank that has its node for itself, in shared memory: the records of its handle, each of
/// which is a row. So it sends ahead of notify's end, and hears no objections of that yet.
struct HandleRows {
  std::int32_t records[plan::kMaxNodes];  // up to each node
  std::int32_t rows[plan::kMaxNodes];     // up to each source

  /// By a warp: true if they are such; else notify finds a fault.
  __device__ bool load(const CombineArgs& args) {
    const int nodes = args.rails.shape.topology.num_nodes();
    const auto take = [&](const std::int32_t* sums, std::int64_t most, std::int32_t* to) {
      bool good = true;
      for (int i = lane_id(); i < nodes; i += 32) {
        to[i] = sums[i];
        good = good && to[i] >= (i == 0 ? 0 : sums[i - 1]) && to[i] <= most;
      }
      return good;
    };
    const bool good = take(args.record_sums, args.num_records, records) &&
                      take(args.row_sums, args.block_rows, rows);
    __syncwarp();  // all lanes read what each of them wrote
    return __all_sync(0xffffffff, good) != 0;
  }
};

/// By a warp that writes to rings: the sums that it puts there, up to a record that is not allowed:
/// whoever waits for that one hears of the fault. A row alone need not be rounded on the way.
template <class T>
class Sums {
 public:
  __device__ Sums(const CombineArgs& args, const Blocks& blocks, const HandleRows& known,
                  const MappedPeers& peers, const Role& role, Sources& sources, ItemEnd* ends)
      : turns(args.rails, peers, args.item,
              {args.comm.num_ranks == 1 ? known.records : blocks.records, true, nullptr}, role),
        args_(args),
        blocks_(blocks),
        known_rows_(known),
        peers_(peers),
        sources_(sources),
        ends_(ends) {}

  __device__ __forceinline__ bool operator()(Piece& piece, SendNote& note) {
    const Rails& rails = args_.rails;
    const ItemShape& item = args_.item;
    if (!turns.find([&](RingOut& end) { return look_out(rails, peers_, item, end); })) return false;
    const RingOut& end = turns.end;
    begin_ = item.x_begin(end.piece);
    piece.bytes = static_cast<std::uint32_t>(item.x_size(end.piece));
    piece.from = args_.comm.num_ranks == 1 ? take_row() : take_sum();
    if (rows_ < 0) return false;
    note.to[0] = end.at + item.head_bytes;
    note.bytes = piece.bytes;
    note.end = ends_.put(end, static_cast<std::uint32_t>(item.head_bytes) + piece.bytes);
    turns.advance();
    if (args_.comm.num_ranks == 1 && end.left > 0) load(end);
    return true;
  }
  /// Where there is not one row.
  __device__ __forceinline__ void fill(std::byte* stage, const Piece& piece) {
    sum_part<T>(sources_, rows_, begin_, static_cast<int>(piece.bytes), stage);
  }

  RingTurns<End::kOut> turns;

 private:
  /// The weights of the ring's next item go to the peer; returns where its part of x is, or null:
  /// it is to be filled in.
  __device__ __forceinline__ const std::byte* take_sum() {
    const RingOut& end = turns.end;
    RecordHeads heads;
    const std::int64_t first = plan::part_of(blocks_.records, end.node(args_.rails)).begin;
    heads.load(args_, first + end.record);
    rows_ = list_rows(args_, blocks_, heads, args_.rails.rank_of_peer(end.peer), sources_);
    compose_weights(args_, sources_, rows_, end.at);
    return rows_ == 1 ? sources_.rows[0] + begin_ : nullptr;
  }

  /// The same for a rank that has its node for itself: each record is a row, known ahead.
  __device__ __forceinline__ const std::byte* take_row() {
    const RingOut& end = turns.end;
    load(end);
    auto* words = reinterpret_cast<float*>(end.at);
    const auto count = static_cast<int>(args_.format.topk_weights_bytes / 4);
    if (lane_id() < count) words[lane_id()] = weight_;
#pragma unroll 1
    for (int k = 32 + lane_id(); k < count; k += 32) words[k] = weight_of(row_, k);
    rows_ = row_ < 0 ? -1 : 1;
    return blocks_.of[0].x + row_ * args_.format.x_bytes + begin_;
  }
  /// Puts the weights of the record on their way, unless they are known.
  __device__ __forceinline__ void load(const RingOut& end) {
    const int node = end.node(args_.rails);
    if (node == node_ && end.record == record_) return;
    known_ = node == node_ && end.record == record_ + end.stride ? known_ + 1 : 32;
    if (known_ >= 32) {
      known_ = 0;
      const auto part = plan::part_of(known_rows_.records, node);
      const std::int64_t mine = part.begin + end.record + std::int64_t{lane_id()} * end.stride;
      head_ = mine < part.end ? args_.send_nvl_head[mine] : -1;
    }
    node_ = node;
    record_ = end.record;
    const std::int32_t head = __shfl_sync(0xffffffff, head_, known_);
    const auto rows = plan::part_of(known_rows_.rows, node);  // a node is a source
    const bool good = head >= 0 && head < rows.end - rows.begin;
    if (!good) {
      // Notify may yet find that the handle is another one, which says more, and comes first.
      wait_for_kernel_before();
      raise_invalid(args_.comm, Finding::kBadNvlHead,
                    plan::part_of(known_rows_.records, node).begin + record_, 0, head,
                    rows.end - rows.begin);
    }
    row_ = good ? rows.begin + head : -1;
    weight_ = lane_id() < args_.format.topk_weights_bytes / 4 ? weight_of(row_, lane_id()) : 0.0f;
  }
  __device__ __forceinline__ float weight_of(std::int64_t row, int k) const {
    if (row < 0) return 0.0f;
    return plan::from_float<float>(reinterpret_cast<const float*>(
        blocks_.of[0].topk_weights)[row * args_.comm.record.num_topk + k]);
  }

  const CombineArgs& args_;
  const Blocks& blocks_;
  const HandleRows& known_rows_;
  const MappedPeers& peers_;
  Sources& sources_;
  ItemEnds<SumPump> ends_;
  std::int64_t begin_ = 0;  // in the row, of the item under way
  int rows_ = 0;            // listed, or -1: the record is not allowed
  // Of a rank that has its node for itself:
  int node_ = -1;             // of the row that is known
  std::int32_t record_ = -1;  // of it
  std::int32_t head_ = -1;    // lane i has the position of the i-th of 32 records known at once
  int known_ = 32;            // which of these record_ is
  std::int64_t row_ = -1;
  float weight_ = 0.0f;
};

}  // namespace deep_ep::cuda::internode
