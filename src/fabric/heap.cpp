#include "fabric/heap.hpp"

#include <algorithm>
#include <iterator>

#include "base/error.hpp"

namespace deep_ep::fabric {
namespace {

std::int64_t round_up(std::int64_t bytes) {
  require(bytes >= 0 && bytes <= (std::int64_t{1} << 62), "bytes: {} is not allowed", bytes);
  return (std::max<std::int64_t>(bytes, 1) + Heap::kAlignment - 1) / Heap::kAlignment *
         Heap::kAlignment;
}

}  // namespace

void Heap::add(int segment, std::int64_t begin, std::int64_t end) {
  begin = (begin + kAlignment - 1) / kAlignment * kAlignment;
  end = end / kAlignment * kAlignment;
  if (begin >= end) return;
  const std::lock_guard lock(mutex_);
  add_part(segment, begin, end - begin);
}

std::optional<Block> Heap::try_allocate(std::int64_t bytes) {
  bytes = round_up(bytes);
  Block block;
  const std::lock_guard lock(mutex_);
  if (take(bytes, block)) return block;
  return std::nullopt;
}

Block Heap::allocate(std::int64_t bytes) {
  bytes = round_up(bytes);
  if (const std::optional<Block> found = try_allocate(bytes)) return *found;
  // Without mutex_, so that results can be released meanwhile.
  const std::lock_guard growing(grow_mutex_);
  if (const std::optional<Block> found = try_allocate(bytes)) return *found;
  const NewSegment fresh = grow_(bytes);
  Block block;
  const std::lock_guard lock(mutex_);
  add_part(fresh.segment, 0, fresh.bytes / kAlignment * kAlignment);
  if (!take(bytes, block))
    throw Error(ErrorCode::kOutOfMemory,
                fmt::format("a block of {} bytes does not fit a new segment of {} bytes", bytes,
                            fresh.bytes));
  return block;
}

void Heap::free(const Block& block) {
  const std::lock_guard lock(mutex_);
  live_bytes_ -= block.bytes;
  Parts::node_type part = std::move(spare_.back());
  spare_.pop_back();
  part.key() = {block.segment, block.offset};
  part.mapped() = block.bytes;
  give(std::move(part));
}

void Heap::reserve(std::int64_t bytes) {
  bytes = round_up(bytes);
  const std::lock_guard growing(grow_mutex_);
  {
    const std::lock_guard lock(mutex_);
    if (fits(bytes)) return;
  }
  const NewSegment fresh = grow_(bytes);
  const std::lock_guard lock(mutex_);
  add_part(fresh.segment, 0, fresh.bytes / kAlignment * kAlignment);
}

std::int64_t Heap::live_bytes() const {
  const std::lock_guard lock(mutex_);
  return live_bytes_;
}

std::int64_t Heap::free_bytes() const {
  const std::lock_guard lock(mutex_);
  std::int64_t sum = 0;
  for (const auto& [key, size] : free_) sum += size;
  return sum;
}

bool Heap::take(std::int64_t bytes, Block& block) {
  for (auto part = free_.begin(); part != free_.end(); ++part) {
    const auto [key, size] = *part;
    if (size < bytes) continue;
    Parts spare;
    spare.emplace(key, bytes);
    spare_.push_back(spare.extract(spare.begin()));
    // From here on nothing throws.
    block = {key.segment, key.offset, bytes};
    auto rest = free_.extract(part);
    if (size > bytes) {
      rest.key().offset += bytes;
      rest.mapped() -= bytes;
      free_.insert(std::move(rest));
    }
    live_bytes_ += bytes;
    return true;
  }
  return false;
}

bool Heap::fits(std::int64_t bytes) const {
  return std::any_of(free_.begin(), free_.end(),
                     [&](const auto& part) { return part.second >= bytes; });
}

void Heap::add_part(int segment, std::int64_t offset, std::int64_t bytes) {
  Parts part;
  part.emplace(Key{segment, offset}, bytes);
  give(part.extract(part.begin()));
}

void Heap::give(Parts::node_type part) {
  const auto [segment, offset] = part.key();
  auto next = free_.lower_bound(part.key());
  if (next != free_.end() && next->first == Key{segment, offset + part.mapped()}) {
    part.mapped() += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first.segment == segment && before->first.offset + before->second == offset) {
      before->second += part.mapped();
      return;
    }
  }
  free_.insert(std::move(part));
}

}  // namespace deep_ep::fabric
