#include "fabric/fabric.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "base/error.hpp"
#include "base/library_thread.hpp"
#include "base/log.hpp"
#include "fabric/bootstrap_star.hpp"
#include "fabric/mesh.hpp"
#include "fabric/peer.hpp"
#include "fabric/segment_table.hpp"

namespace deep_ep::fabric {

using std::chrono::milliseconds;

struct Fabric::State {
  State(int own_rank, int size, std::unique_ptr<Memory> kind)
      : rank(own_rank), num_ranks(size), memory(std::move(kind)), table(size) {}

  const int rank;
  const int num_ranks;
  const pid_t owner = getpid();
  const std::unique_ptr<Memory> memory;
  SegmentTable table;

  mutable std::mutex mutex;  // guards what follows, but not `helper`
  std::condition_variable changed;
  std::vector<std::shared_ptr<Mapping>> own;
  std::optional<Door> door;
  std::vector<Peer> peers;  // connected ones and those that have gone; fixed once made
  std::map<std::pair<int, int>, Error> unmappable;  // why, by rank and segment
  bool opened = false;
  bool closed = false;

  Callbacks callbacks;
  Fd wake;  // eventfd: the helper looks at `closed` and the outboxes again
  std::thread helper;

  void announce(int segment, const Descriptor& descriptor, Peer& peer);
  void connect_peers(std::vector<Fd> links);
  void await_peers(milliseconds timeout);
  void rouse() const;

  // The helper thread.
  void run();
  bool turn();
  void drain(Peer& peer);
  void take_segment(Peer& peer, const Received& received);
  void lose(Peer& peer);
  void say_goodbye();
};

namespace {

/// How long close() tries to hand a goodbye to a peer that does not read.
constexpr milliseconds kGoodbyePatience{200};
/// How long a rank that saw another one go waits for others to go.
constexpr milliseconds kCausePatience{200};

/// A Descriptor's file descriptor belongs to its holder.
struct Described {
  Descriptor descriptor;
  Fd fd;
  explicit Described(Descriptor given) : descriptor(std::move(given)), fd(descriptor.fd) {}
};

}  // namespace

Fabric::Fabric(int rank, int num_ranks, std::unique_ptr<Memory> memory)
    : rank_(rank), num_ranks_(num_ranks) {
  require(num_ranks >= 1, "num_ranks: {} is not allowed, must be at least 1", num_ranks);
  require(rank >= 0 && rank < num_ranks, "rank: {} is not allowed, must be from 0 to {}", rank,
          num_ranks - 1);
  state_ = std::make_unique<State>(rank, num_ranks, std::move(memory));
}

Fabric::~Fabric() { close(); }

int Fabric::add_segment(std::int64_t bytes) {
  // Without the lock: taking the memory lasts.
  std::shared_ptr<Mapping> mapping = state_->memory->allocate(bytes);
  const Described described(state_->memory->describe(*mapping));
  const std::lock_guard lock(state_->mutex);
  if (state_->closed) throw Error(ErrorCode::kUsage, "add_segment after close");
  const int segment = static_cast<int>(state_->own.size());
  if (segment == SegmentTable::kMaxSegments)
    throw Error(ErrorCode::kOutOfMemory,
                fmt::format("rank {} has {} segments already, the most there can be; a larger "
                            "starting size needs fewer",
                            rank_, segment));
  state_->table.set(rank_, segment, mapping->base());
  state_->own.push_back(std::move(mapping));
  for (Peer& peer : state_->peers) state_->announce(segment, described.descriptor, peer);
  return segment;
}

std::string Fabric::export_handles() {
  const std::lock_guard lock(state_->mutex);
  if (state_->closed || state_->opened)
    throw Error(ErrorCode::kUsage, "export_handles after open_handles or close");
  if (!state_->door) state_->door.emplace(rank_);
  return state_->door->address.encode();
}

void Fabric::open_handles(const std::vector<std::string>& exported, milliseconds timeout,
                          Callbacks callbacks) {
  require(exported.size() == static_cast<std::size_t>(num_ranks_),
          "exported: {} elements, must be one for each of {} ranks", exported.size(), num_ranks_);
  std::vector<PeerAddress> addresses;
  for (int i = 0; i < num_ranks_; ++i) addresses.push_back(PeerAddress::decode(exported[i], i));
  std::optional<Door> door;
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->closed || state_->opened || !state_->door)
      throw Error(ErrorCode::kUsage,
                  "open_handles needs export_handles before, and comes once, before close");
    state_->opened = true;
    door = std::exchange(state_->door, std::nullopt);
  }
  state_->callbacks = std::move(callbacks);
  try {
    require_one_host(addresses);
    if (num_ranks_ == 1) return;
    const Deadline deadline(timeout);
    state_->connect_peers(join_mesh(*door, addresses, timeout));
    state_->await_peers(milliseconds(deadline.poll_ms()));
  } catch (...) {
    close();
    throw;
  }
}

std::byte* Fabric::base(int rank, int segment) const noexcept {
  return state_->table.get(rank, segment);
}

std::byte* Fabric::mapped_base(int rank, int segment) const {
  if (std::byte* found = base(rank, segment)) return found;
  const std::lock_guard lock(state_->mutex);
  const auto why = state_->unmappable.find({rank, segment});
  if (why != state_->unmappable.end()) throw Error(why->second);
  return nullptr;
}

std::shared_ptr<Mapping> Fabric::own_segment(int segment) const {
  const std::lock_guard lock(state_->mutex);
  const int count = static_cast<int>(state_->own.size());
  require(segment >= 0 && segment < count, "segment: {} is not one of the {} own segments", segment,
          count);
  return state_->own[segment];
}

int Fabric::num_own_segments() const {
  const std::lock_guard lock(state_->mutex);
  return static_cast<int>(state_->own.size());
}

Fabric::Spot Fabric::locate(const void* memory, std::int64_t bytes) const {
  const auto at = reinterpret_cast<std::uintptr_t>(memory);
  const std::lock_guard lock(state_->mutex);
  for (int i = 0; i < static_cast<int>(state_->own.size()); ++i) {
    const auto begin = reinterpret_cast<std::uintptr_t>(state_->own[i]->base());
    const std::uintptr_t end = begin + state_->own[i]->bytes();
    if (at >= begin && at + bytes <= end) return {i, static_cast<std::int64_t>(at - begin)};
  }
  return {};
}

std::int64_t Fabric::own_bytes() const {
  const std::lock_guard lock(state_->mutex);
  std::int64_t sum = 0;
  for (const auto& mapping : state_->own) sum += mapping->bytes();
  return sum;
}

void Fabric::close() {
  if (state_->owner != getpid()) {
    // A child that was forked off has neither the helper thread nor a say on the parent's links.
    (void)state_.release();
    state_ = std::make_unique<State>(rank_, num_ranks_, nullptr);
    state_->closed = true;
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->closed) return;
    state_->closed = true;
    state_->door.reset();
  }
  state_->rouse();
  if (state_->helper.joinable()) state_->helper.join();
  state_->say_goodbye();
  state_->table.clear();
  const std::lock_guard lock(state_->mutex);
  for (Peer& peer : state_->peers) peer.mappings.clear();
  state_->own.clear();
}

void Fabric::State::announce(int segment, const Descriptor& descriptor, Peer& peer) {
  const Message message{Message::Kind::kSegment, segment, descriptor.bytes};
  peer.post(message.encode(), descriptor.fd);
  if (peer.has_waiting()) rouse();
}

void Fabric::State::connect_peers(std::vector<Fd> links) {
  wake = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake) throw_errno("eventfd");
  const std::lock_guard lock(mutex);
  for (int i = 0; i < num_ranks; ++i) {
    if (i == rank) continue;
    Peer& peer = peers.emplace_back();
    peer.rank = i;
    peer.lifetime = watch_process_behind(links[i].get());
    peer.link = std::move(links[i]);
  }
  for (std::size_t segment = 0; segment < own.size(); ++segment) {
    const Described described(memory->describe(*own[segment]));
    for (Peer& peer : peers) announce(static_cast<int>(segment), described.descriptor, peer);
  }
  for (Peer& peer : peers) peer.post(Message{Message::Kind::kReady}.encode(), -1);
  helper = start_library_thread([this] { run(); });
  pthread_setname_np(helper.native_handle(), "deep_ep_fabric");
}

void Fabric::State::await_peers(milliseconds timeout) {
  std::vector<int> waited_for;
  std::vector<int> lost;
  const auto settled = [&] {
    waited_for.clear();
    lost.clear();
    for (const Peer& peer : peers) {
      if (!peer.ready) (peer.link ? waited_for : lost).push_back(peer.rank);
    }
    return !unmappable.empty() || !lost.empty() || waited_for.empty();
  };
  std::unique_lock lock(mutex);
  changed.wait_until(lock, Deadline(timeout).end(), settled);
  // It may have left because of another one, whose end shows here a little later.
  if (!lost.empty()) {
    changed.wait_until(lock, Deadline(std::min(timeout, kCausePatience)).end(), [&] {
      settled();
      return !unmappable.empty() || waited_for.empty();
    });
  }
  if (!unmappable.empty()) throw unmappable.begin()->second;
  if (!lost.empty())
    throw Error(ErrorCode::kPeerFailed,
                fmt::format("rank {}: {} left or died while the ranks were mapping memory", rank,
                            name_ranks(lost)),
                lost);
  if (!waited_for.empty())
    throw Error(ErrorCode::kTimeout,
                fmt::format("rank {}: {} connected, but did not hand over its memory in time", rank,
                            name_ranks(waited_for)),
                waited_for);
}

void Fabric::State::rouse() const {
  const std::uint64_t one = 1;
  if (wake) (void)!write(wake.get(), &one, sizeof(one));
}

void Fabric::State::run() {
  while (turn()) {
  }
}

bool Fabric::State::turn() {
  std::vector<pollfd> polled{{wake.get(), POLLIN, 0}};
  {
    const std::lock_guard lock(mutex);
    if (closed) return false;
    for (const Peer& peer : peers) {
      const short events = peer.has_waiting() ? POLLIN | POLLOUT : POLLIN;
      polled.push_back({peer.link.get(), events, 0});
      polled.push_back({peer.lifetime.get(), POLLIN, 0});
    }
  }
  if (poll(polled.data(), polled.size(), -1) < 0) return true;
  std::uint64_t count = 0;
  if (polled[0].revents != 0) (void)!read(wake.get(), &count, sizeof(count));
  for (std::size_t i = 0; i < peers.size(); ++i) {
    Peer& peer = peers[i];
    const bool ended = polled[2 + 2 * i].revents != 0;
    // After its process has ended, so everything it has sent is read before it counts as gone.
    if (polled[1 + 2 * i].revents != 0 || ended) drain(peer);
    if (ended && peer.link) lose(peer);
    const std::lock_guard lock(mutex);
    // A link that can be written to but refuses is short of something else: do not spin on it.
    if (!peer.flush() && (polled[1 + 2 * i].revents & POLLOUT) != 0)
      std::this_thread::sleep_for(milliseconds(1));
  }
  return true;
}

void Fabric::State::drain(Peer& peer) {
  while (peer.link) {
    const Received received = receive_packet(peer.link.get());
    if (received.state == Received::State::kNothing) return;
    if (received.state == Received::State::kClosed) return lose(peer);
    switch (received.message.kind) {
      case Message::Kind::kSegment:
        take_segment(peer, received);
        break;
      case Message::Kind::kReady: {
        const std::lock_guard lock(mutex);
        peer.ready = true;
        changed.notify_all();
        break;
      }
      case Message::Kind::kGoodbye:
        peer.orderly = true;
        return lose(peer);
    }
  }
}

void Fabric::State::take_segment(Peer& peer, const Received& received) {
  const int segment = received.message.segment;
  try {
    require(segment >= 0 && segment < SegmentTable::kMaxSegments, "segment {} is out of range",
            segment);
    const Descriptor descriptor{received.message.descriptor, received.fd.get()};
    peer.mappings.push_back(memory->map(descriptor));
    table.set(peer.rank, segment, peer.mappings.back()->base());
  } catch (const std::exception& error) {
    const std::string text = fmt::format("rank {}: segment {} of rank {} cannot be mapped: {}",
                                         rank, segment, peer.rank, error.what());
    log::warn("{}", text);
    const std::lock_guard lock(mutex);
    unmappable.emplace(std::pair(peer.rank, segment), Error(ErrorCode::kSystem, text, {rank}));
    changed.notify_all();
    return;
  }
  if (callbacks.segment_mapped)
    callbacks.segment_mapped(peer.rank, segment, peer.mappings.back()->base());
}

void Fabric::State::lose(Peer& peer) {
  {
    const std::lock_guard lock(mutex);
    peer.hang_up();
    changed.notify_all();
  }
  log::debug("rank {}: rank {} {}", rank, peer.rank, peer.orderly ? "closed" : "died");
  if (callbacks.peer_gone) callbacks.peer_gone(peer.rank, peer.orderly);
}

void Fabric::State::say_goodbye() {
  const std::lock_guard lock(mutex);
  const std::string packet = Message{Message::Kind::kGoodbye}.encode();
  for (Peer& peer : peers) peer.post(packet, -1);
  const Deadline deadline(kGoodbyePatience);
  for (Peer& peer : peers) {
    while (!peer.flush() && !deadline.expired()) std::this_thread::sleep_for(milliseconds(1));
    peer.hang_up();
  }
}

}  // namespace deep_ep::fabric
