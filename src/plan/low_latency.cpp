#include "plan/low_latency.hpp"

#include <algorithm>

namespace deep_ep::plan {

namespace {

/// Bytes of one part for a call: packets without and with its rows, plain rows.
struct Need {
  std::int64_t packets;
  std::int64_t packets_with_rows;
  std::int64_t plain;
};

Need need_of(LowLatencyKind kind, const LowLatencyShape& shape) {
  const LowLatencyPlaces places = carve_places(nullptr, -1, nullptr, kind, shape);
  const MessageArea& rows = kind == LowLatencyKind::kCombine ? places.returns : places.messages;
  const std::int64_t packets = shape.num_ranks * shape.max_tokens * rows.row_groups *
                               MessageArea::kGroupPackets *
                               static_cast<std::int64_t>(sizeof(Packet));
  return {places.packet_bytes, places.packet_bytes + packets + Carver::kAlignment,
          places.plain_bytes};
}

}  // namespace

std::int64_t LowLatencyLayout::bytes(const LowLatencyShape& dispatch,
                                     const LowLatencyShape& combine) {
  const Need a = need_of(LowLatencyKind::kDispatch, dispatch);
  const Need b = need_of(LowLatencyKind::kCombine, combine);
  const std::int64_t heads = std::max(a.packets, b.packets);
  const std::int64_t all = std::max(a.packets_with_rows, b.packets_with_rows);
  const std::int64_t packets = std::max(heads, std::min(all, kMaxPacketBytes / kParts));
  const std::int64_t plain = std::max(a.plain, b.plain);
  // Asks carve() itself, whose parts grow with `bytes`.
  std::int64_t too_few = 0;
  std::int64_t enough = std::int64_t{1} << 50;
  while (enough - too_few > Carver::kAlignment) {
    const std::int64_t middle = too_few + (enough - too_few) / 2;
    const LowLatencyLayout layout = carve(nullptr, middle, dispatch.num_ranks);
    const bool fits = layout.packet_part_bytes >= packets && layout.plain_part_bytes >= plain;
    (fits ? enough : too_few) = middle;
  }
  return (enough + Carver::kAlignment - 1) / Carver::kAlignment * Carver::kAlignment;
}

bool LowLatencyLayout::fits(const LowLatencyShape& shape, LowLatencyKind kind, std::int64_t bytes) {
  const LowLatencyLayout layout = carve(nullptr, bytes, shape.num_ranks);
  const Need need = need_of(kind, shape);
  return need.packets <= layout.packet_part_bytes && need.plain <= layout.plain_part_bytes;
}

}  // namespace deep_ep::plan
