#include "backend/host/context.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "backend/agreement.hpp"
#include "base/env.hpp"
#include "base/error.hpp"
#include "base/log.hpp"

namespace deep_ep::host {

namespace {

constexpr int kMaxLanes = 64;
// Below this a ring holds too few rows for sender and receiver to work at the same time.
constexpr std::int64_t kMinRingBytes = 64 << 10;

int num_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

int choose_threads(const BackendOptions& options) {
  int threads = options.num_threads > 0 ? options.num_threads : env::num_threads();
  if (threads <= 0) threads = num_cores() / options.ranks_on_host;
  return std::clamp(threads, 1, kMaxLanes);
}

// The area of all rings of a rank: at least one ring of useful size from every peer.
std::int64_t inbox_bytes(const plan::Topology& topology) {
  const int num_ranks = topology.ranks_per_node;
  const std::int64_t bytes =
      std::max(env::inbox_bytes(), kMinRingBytes * num_ranks * topology.num_nodes());
  const std::int64_t unit = std::int64_t{128} * kMaxLanes * num_ranks;
  return (bytes + unit - 1) / unit * unit;
}

// The control block is carved for the most lanes, so that its layout does not depend on how many
// the ranks agree on.
protocol::ControlShape control_shape(const plan::Topology& topology) {
  const int num_ranks = topology.ranks_per_node;
  protocol::ControlShape shape{num_ranks, kMaxLanes,
                               inbox_bytes(topology) / (kMaxLanes * num_ranks)};
  // Of its rail peers' tokens too: RailCounts.
  if (topology.num_nodes() > 1) shape.counts_per_source = topology.num_nodes() * (num_ranks + 1);
  return shape;
}

// What a rank tells the others before they share memory.
struct Introduction {
  std::int32_t num_threads;
  env::CombinePath path;
  std::int64_t wanted_inbox;
  std::uint64_t first_ticket;
  fabric::Beacon::Sight sight;
};

const char* to_string(env::CombinePath path) {
  switch (path) {
    case env::CombinePath::kPull:
      return "pull";
    case env::CombinePath::kRing:
      return "ring";
    default:
      return "auto";
  }
}

// Rows that one thread has fetched and not summed yet: half of a core's own cache, where that is
// large; else more than it, since fewer, longer reads gain more than it loses. Rows of 14336 bytes;
// two cores of an EPYC (Zen 4), R=2: 0.1 MiB 12.3 ms, 0.5 MiB 9.6, 1 to 4 MiB 7.7 to 9, 15 MiB 12;
// of a Xeon with 2 MiB each, R=4: 0.25 MiB 69 to 76, 0.5 and 1 MiB 62 to 69, 2 MiB 68 to 72.
std::int64_t choose_scratch_bytes() {
  constexpr std::int64_t kBytes = 2 << 20, kLargeCache = 2 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const std::int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (cache >= kLargeCache) return std::min(cache / 2, kBytes);
#endif
  return kBytes;
}

}  // namespace

Context::Context(const BackendOptions& options)
    : topology_(options.topology),
      first_rank_(options.rank - topology_.index_of(options.rank)),
      rank_(topology_.index_of(options.rank)),
      num_ranks_(topology_.ranks_per_node),
      crowded_(options.ranks_on_host > num_cores()),
      fabric_(rank_, num_ranks_, fabric::make_memfd_memory()),
      pool_(choose_threads(options)),
      memory_(num_ranks_),
      path_(env::combine_path()),
      gone_(num_ranks_) {
  for (int i = 0; i < num_ranks_; ++i) all_ranks_.push_back(peer_in_turn(i));
}

std::int64_t Context::control_bytes(const plan::Topology& topology) {
  return protocol::ControlBlock::bytes(control_shape(topology));
}

std::string Context::export_handles(std::int64_t heap_bytes) {
  fabric_.add_segment(heap_bytes);
  Carver carver(fabric_.base(rank_, 0));
  own_doorbell_ = protocol::ControlBlock::carve(carver, control_shape(topology_)).doorbell;
  const Introduction intro{pool_.size(), path_, env::inbox_bytes(), env::first_ticket(),
                           beacon_.sight()};
  return std::string(reinterpret_cast<const char*>(&intro), sizeof intro) +
         fabric_.export_handles();
}

void Context::open_handles(const std::vector<std::string>& exported,
                           std::chrono::milliseconds timeout) {
  std::vector<std::string> handles;
  int most_threads = 1;
  const std::int64_t wanted = env::inbox_bytes();
  for (int i = 0; i < topology_.num_ranks; ++i) {
    Introduction intro{};
    require(exported[i].size() >= sizeof intro, "rank {} sent {} bytes to sync, at least {} needed",
            i, exported[i].size(), sizeof intro);
    std::memcpy(&intro, exported[i].data(), sizeof intro);
    // As it was set: staging_bytes_ follows from that, not from what it is rounded to.
    if (intro.wanted_inbox != wanted) {
      throw Error(ErrorCode::kDisagreement,
                  fmt::format("DEEP_EP_INBOX_BYTES is {} on rank {} and {} on rank {}", wanted,
                              global_rank(), intro.wanted_inbox, i),
                  {i});
    }
    if (intro.first_ticket != env::first_ticket()) {
      throw Error(ErrorCode::kDisagreement,
                  fmt::format("DEEP_EP_FIRST_TICKET is {} on rank {} and {} on rank {}",
                              env::first_ticket(), global_rank(), intro.first_ticket, i),
                  {i});
    }
    if (intro.path != path_) {
      throw Error(ErrorCode::kDisagreement,
                  fmt::format("DEEP_EP_COMBINE is {} on rank {} and {} on rank {}",
                              to_string(path_), global_rank(), to_string(intro.path), i),
                  {i});
    }
    most_threads = std::max<int>(most_threads, intro.num_threads);
    if (local_rank(i) < 0) continue;
    sights_.push_back(intro.sight);
    handles.push_back(exported[i].substr(sizeof intro));
  }
  open_fabric(handles, timeout);

  staging_bytes_ = wanted / 128 * 64;
  control_.resize(num_ranks_);
  for (int i = 0; i < num_ranks_; ++i) {
    Carver carver(fabric_.base(i, 0));
    control_[i] = protocol::ControlBlock::carve(carver, control_shape(topology_));
  }
  // With several nodes a lane has a ring for the tokens of each.
  const std::int64_t inbox = inbox_bytes(topology_);
  const int nodes = topology_.num_nodes();
  num_lanes_ = nodes * static_cast<int>(
                           std::clamp<std::int64_t>(inbox / (kMinRingBytes * num_ranks_ * nodes), 1,
                                                    std::min(most_threads, kMaxLanes / nodes)));
  const protocol::RingShape shape{inbox / (num_lanes_ * num_ranks_) / 128 * 128};
  for (int lane = 0; lane < num_lanes_; ++lane) {
    for (int i = 0; i < num_ranks_; ++i) {
      const std::int64_t there = std::int64_t{lane} * num_ranks_ + rank_;
      const std::int64_t here = std::int64_t{lane} * num_ranks_ + i;
      senders_.push_back({shape, peer(i).ring_data + there * shape.bytes, &peer(i).ring_tail[there],
                          &own().ring_head[here], 0, 0});
      receivers_.push_back({shape, own().ring_data + here * shape.bytes, &own().ring_tail[here],
                            &peer(i).ring_head[there], 0, 0});
    }
  }
}

void Context::open_fabric(const std::vector<std::string>& handles,
                          std::chrono::milliseconds timeout) {
  try {
    fabric_.open_handles(
        handles, timeout,
        {.peer_gone = [this](int rank, bool orderly) { peer_gone(rank, orderly); },
         .segment_mapped = [this](int, int, std::byte*) { own_doorbell_->ring(); }});
  } catch (const Error& error) {
    if (topology_.num_nodes() == 1) throw;
    std::vector<int> ranks = error.ranks();
    for (int& rank : ranks) rank = global_rank(rank);
    throw Error(error.code(),
                fmt::format("among ranks {} to {}, one node, counted from 0: {}", first_rank_,
                            global_rank(num_ranks_ - 1), error.what()),
                ranks);
  }
}

std::string Context::why_no_pull() {
  if (path_ == env::CombinePath::kRing) return {};
  for (int i = 0; i < num_ranks_; ++i) {
    if (i == rank_) continue;
    const std::string why = memory_[i].open(sights_[i]);
    if (!why.empty())
      return fmt::format("rank {} cannot read rank {}: {}", global_rank(), global_rank(i), why);
  }
  return {};
}

void Context::choose_path(const std::vector<std::string>& why_no_pull) {
  pulls_ = path_ != env::CombinePath::kRing;
  for (const std::string& why : why_no_pull) {
    if (why.empty()) continue;
    if (path_ == env::CombinePath::kPull) {
      throw Error(ErrorCode::kUnsupported,
                  fmt::format("DEEP_EP_COMBINE is pull, but {}; see docs/memory.md for the rights "
                              "that this takes, or use auto or ring",
                              why));
    }
    if (global_rank() == 0) log::debug("combine uses the inbox: {}", why);
    pulls_ = false;
  }
  if (!pulls_) memory_.clear();
  scratch_.resize(pool_.size());
  scratch_bytes_ =
      std::max<std::int64_t>(std::min(choose_scratch_bytes(), env::inbox_bytes() / pool_.size()),
                             std::int64_t{64} * num_ranks_);
  log::debug("rank {}: combine {}", global_rank(), pulls_ ? "pulls rows" : "uses the inbox");
}

std::byte* Context::segment_base(const Call& call, int rank, int segment) const {
  try {
    return fabric_.mapped_base(rank, segment);
  } catch (const Error& error) {
    throw Error(error.code(),
                fmt::format("{} (call {}) on rank {}: {}", call.operation, call.epoch,
                            global_rank(), error.what()),
                {global_rank()});
  }
}

std::byte* Context::scratch(int thread) {
  std::shared_ptr<fabric::Mapping>& memory = scratch_[thread];
  if (!memory) memory = fabric::allocate_private(scratch_bytes_);
  return memory->base();
}

// The mailbox of two calls ago is read by nobody any more (I3).
void Context::post(const Call& call) {
  for (int i = 0; i < num_ranks_; ++i) {
    const int to = peer_in_turn(i);
    protocol::Mailbox& mailbox = mailbox_of(to, call);
    mailbox.record[rank_] = call.record;
    mailbox.posted[rank_].publish(call.epoch);
    ring_doorbell(to);
  }
}

bool Context::posted(const Call& call, int source) {
  // acquire: pairs with publish() in post() of the source.
  return mailbox_of(rank_, call).posted[source].reached(call.epoch);
}

void Context::check_agreement(const Call& call, int source) {
  const auto difference = find_difference(call.record, mailbox_of(rank_, call).record[source]);
  if (!difference) return;
  throw Error(ErrorCode::kDisagreement,
              fmt::format("{} (call {}): ranks disagree on {}: {} on rank {}, {} on rank {}",
                          call.operation, call.epoch, difference->field, difference->mine,
                          global_rank(), difference->theirs, global_rank(source)),
              {global_rank(source)});
}

// A rank that is behind this has seen all others enter the call (I2).
void Context::wait_posted(const Call& call, std::int64_t* wait_stats) {
  // acquire: pairs with publish() in post() of each rank.
  wait_flags(call, "the other ranks to call it", mailbox_of(rank_, call).posted, all_ranks_,
             wait_stats);
  for (int i = 0; i < num_ranks_; ++i) check_agreement(call, i);
}

void Context::wait_flags(const Call& call, const char* what, const protocol::EpochFlag* flags,
                         std::vector<int> ranks, std::int64_t* wait_stats) {
  const auto start = std::chrono::steady_clock::now();
  const auto arrived = [&](int rank) {
    if (!flags[rank].reached(call.epoch)) return false;
    if (wait_stats != nullptr) {
      wait_stats[global_rank(rank)] +=
          (std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1);
    }
    return true;
  };
  wait(
      call, what,
      [&] {
        std::erase_if(ranks, arrived);
        return ranks.empty();
      },
      [&] {
        std::vector<Missing> missing;
        for (const int rank : ranks)
          missing.push_back({global_rank(rank), call.epoch, flags[rank].seen()});
        return missing;
      });
}

}  // namespace deep_ep::host
