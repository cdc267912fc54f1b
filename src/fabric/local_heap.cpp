#include "fabric/local_heap.hpp"

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "base/error.hpp"
#include "fabric/agree.hpp"
#include "fabric/memory.hpp"
#include "protocol/atomic.hpp"
#include "protocol/schedule.hpp"

namespace deep_ep::fabric {

struct LocalPiece {
  std::shared_ptr<Mapping> memory;
  std::int64_t bytes = 0;
  std::atomic<bool> left{false};
  std::mutex mutex;  // guards what follows: its owner takes it away when it leaves
  std::function<void()> on_signal;

  void rouse() {
    const std::lock_guard lock(mutex);
    if (on_signal) on_signal();
  }
};

namespace {

/// The heaps of this process's ranks, by number, while they find each other.
struct Registry {
  std::mutex mutex;
  std::uint64_t next = 1;
  std::map<std::uint64_t, std::shared_ptr<LocalPiece>> pieces;
};

Registry& registry() {
  static Registry all;
  return all;
}

/// In the registry for as long as this object lives.
class Listed {
 public:
  explicit Listed(std::shared_ptr<LocalPiece> piece) {
    const std::lock_guard lock(registry().mutex);
    number_ = registry().next++;
    registry().pieces[number_] = std::move(piece);
  }
  ~Listed() {
    const std::lock_guard lock(registry().mutex);
    registry().pieces.erase(number_);
  }
  Listed(const Listed&) = delete;
  Listed& operator=(const Listed&) = delete;
  std::string name() const { return std::to_string(number_); }

 private:
  std::uint64_t number_;
};

}  // namespace

LocalHeap::LocalHeap(Bootstrap& bootstrap, const SymmetricHeapOptions& options)
    : rank_(bootstrap.rank()), own_(std::make_shared<LocalPiece>()) {
  together(bootstrap, [&] {
    own_->memory = options.memory ? options.memory : allocate_private(options.bytes);
  });
  own_->bytes = options.bytes;
  own_->on_signal = options.on_signal;
  const Listed listed(own_);
  const std::vector<std::string> names = bootstrap.all_gather(listed.name());
  {
    const std::lock_guard lock(registry().mutex);
    for (const std::string& name : names)
      pieces_.push_back(registry().pieces.at(std::stoull(name)));
  }
  bootstrap.barrier();  // all have found all
}

LocalHeap::~LocalHeap() {
  // release: pairs with lost(); what this rank wrote before is visible to who sees it gone.
  own_->left.store(true, std::memory_order_release);
  {
    const std::lock_guard lock(own_->mutex);
    own_->on_signal = {};
  }
  for (const auto& piece : pieces_) piece->rouse();
}

std::byte* LocalHeap::base() const noexcept { return own_->memory->base(); }
std::int64_t LocalHeap::bytes() const noexcept { return own_->bytes; }

LocalPiece& LocalHeap::piece_of(int rank, std::int64_t offset, std::int64_t bytes) const {
  require(rank >= 0 && rank < static_cast<int>(pieces_.size()), "rank is {}, must be in [0, {})",
          rank, pieces_.size());
  require(offset >= 0 && bytes >= 0 && offset + bytes <= own_->bytes,
          "bytes {} to {} are outside of the heap of {} bytes", offset, offset + bytes,
          own_->bytes);
  if (lost(rank)) {
    throw Error(ErrorCode::kPeerFailed, fmt::format("rank {}: rank {} has left", rank_, rank),
                {rank});
  }
  return *pieces_[rank];
}

void LocalHeap::put(int rank, std::int64_t offset, const void* source, std::int64_t bytes) {
  const LocalPiece& piece = piece_of(rank, offset, bytes);
  protocol::schedule_point(protocol::Point::kCopy);
  std::memcpy(piece.memory->base() + offset, source, bytes);
  puts_.fetch_add(1, std::memory_order_relaxed);
  put_bytes_.fetch_add(bytes, std::memory_order_relaxed);
}

void LocalHeap::signal(int rank, std::int64_t offset, std::uint64_t value) {
  LocalPiece& piece = piece_of(rank, offset, sizeof value);
  require(offset % 8 == 0, "offset is {}, must be a multiple of 8", offset);
  protocol::schedule_point(protocol::Point::kPublish);
  // release: pairs with the acquire load of whoever waits for the word.
  protocol::store_release(reinterpret_cast<std::uint64_t*>(piece.memory->base() + offset), value);
  piece.rouse();
  signals_.fetch_add(1, std::memory_order_relaxed);
}

bool LocalHeap::flush(int, std::chrono::milliseconds) { return true; }

bool LocalHeap::lost(int rank) const noexcept {
  return pieces_[rank]->left.load(std::memory_order_acquire);
}

TransportCounts LocalHeap::counts() const noexcept {
  return {puts_.load(std::memory_order_relaxed), put_bytes_.load(std::memory_order_relaxed),
          signals_.load(std::memory_order_relaxed)};
}

}  // namespace deep_ep::fabric
