#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "deep_ep/error.hpp"
#include "fabric/memory.hpp"
#include "fabric/symmetric_heap_factory.hpp"
#include "fabric/ucx/arrivals.hpp"
#include "fabric/ucx/worker.hpp"

namespace deep_ep::fabric::ucx {

/// kLastWord: nothing comes behind it; the target answers kHeard once all before it has come.
enum class Kind : std::uint32_t { kHello, kPut, kSignal, kLastWord, kHeard };

/// What every message begins with.
struct Header {
  std::uint64_t number = 0;  ///< of all messages from `source` to this rank
  std::uint64_t offset = 0;
  std::uint64_t value = 0;  ///< of a signal's word
  std::int32_t source = 0;
  Kind kind = Kind::kHello;
};

/// A SymmetricHeap over active messages: the target's progress thread copies puts into its heap and
/// stores signals' words. Over TCP that is faster than UCX's puts, which take the same way in
/// smaller pieces and are answered one by one; and all stores to a heap are one thread's, so that
/// its release of a word comes behind the bytes of all puts before it, whatever the network.
///
/// Callers post messages themselves. One lock guards all that UCX knows; see Turnstile.
class UcxHeap final : public SymmetricHeap {
 public:
  UcxHeap(int rank, int num_ranks, const SymmetricHeapOptions& options);
  /// Local: gives what is under way to the network, for kLinger at most.
  ~UcxHeap() override;
  UcxHeap(const UcxHeap&) = delete;
  UcxHeap& operator=(const UcxHeap&) = delete;

  std::string address() const { return address_of(worker_.get()); }
  void make_endpoints(const std::vector<std::string>& addresses);
  /// The thread that moves what is under way.
  void start();
  /// Waits for a message from each rank. Throws Error(kTimeout) naming those that were not heard
  /// of, Error(kPeerFailed) naming those that were lost.
  void greet_all();

  std::byte* base() const noexcept override { return memory_->base(); }
  std::int64_t bytes() const noexcept override { return options_.bytes; }
  void put(int rank, std::int64_t offset, const void* source, std::int64_t bytes) override;
  void signal(int rank, std::int64_t offset, std::uint64_t value) override;
  bool flush(int rank, std::chrono::milliseconds timeout) override;
  void abandon() noexcept override { abandoned_ = true; }
  bool lost(int rank) const noexcept override;
  TransportCounts counts() const noexcept override;

 private:
  bool abandoned_ = false;
  struct Peer {
    UcxHeap* heap = nullptr;
    int rank = 0;
    ucp_ep_h endpoint = nullptr;
    std::atomic<bool> lost = false;
    std::string reason;
    bool heard = false;      // kHello
    bool knows = false;      // kHeard
    std::uint64_t sent = 0;  // messages
    Watermark completed;     // of those: UCX needs neither header nor source any more
    Arrivals arrivals;
  };
  /// A message on its way. UCX reads the header until it is complete.
  struct Sending {
    Peer* peer = nullptr;
    Header header;
  };
  /// The progress thread takes the lock as soon as it has let go of it, which callers would hardly
  /// ever get then. So whoever waits holds the door, and the next one waits for the door.
  class Turnstile {
   public:
    std::unique_lock<std::mutex> enter() {
      const std::lock_guard door(door_);
      return std::unique_lock(lock_);
    }

   private:
    std::mutex door_;
    std::mutex lock_;
  };

  // calls.cpp; the last two with the lock
  void check_rank(int rank) const;
  void check_range(int rank, std::int64_t offset, std::int64_t bytes) const;
  void set(const Word& word);
  void send(Peer& peer, Header header, const void* data, std::size_t bytes);
  void complete(Sending& sending, ucs_status_t status);

  // progress.cpp; all but run() with the lock
  void run();
  void tell();
  void wake();
  void lose(Peer& peer, std::string reason);
  void attend();
  void close_lost();
  void answer();
  void say_last_words();
  void close(Peer& peer);
  bool receive(const Header& header, const void* data, std::size_t bytes);
  template <class Ready>
  bool progress_until(std::chrono::steady_clock::time_point deadline, Ready&& ready);
  void flush_all();
  static void on_sent(void* request, ucs_status_t status, void* sending) noexcept;
  static void on_closed(void* request, ucs_status_t status, void* pending) noexcept;
  static void on_error(void* peer, ucp_ep_h endpoint, ucs_status_t status) noexcept;
  static ucs_status_t on_message(void* heap, const void* header, std::size_t header_bytes,
                                 void* data, std::size_t bytes,
                                 const ucp_am_recv_param_t* param) noexcept;

  const SymmetricHeapOptions options_;
  const int rank_;
  std::shared_ptr<Mapping> memory_;
  Context context_;
  Worker worker_;
  int event_fd_;

  mutable Turnstile turnstile_;
  std::condition_variable changed_;
  std::deque<Peer> peers_;
  std::deque<Sending> sendings_;
  std::vector<Sending*> free_sendings_;
  std::vector<Peer*> to_close_;
  std::vector<Peer*> to_answer_;
  int pending_ = 0;      // requests of flushing and closing
  bool asleep_ = false;  // the progress thread, which whoever posts must wake
  bool stop_ = false;
  bool advanced_ = false;  // something that waiters of changed_ look at
  bool signaled_ = false;  // something that options_.on_signal tells
  std::atomic<std::int64_t> num_puts_ = 0;
  std::atomic<std::int64_t> num_put_bytes_ = 0;
  std::atomic<std::int64_t> num_signals_ = 0;
  std::thread thread_;
};

}  // namespace deep_ep::fabric::ucx
