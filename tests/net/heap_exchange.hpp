#pragma once

#include <random>
#include <thread>
#include <vector>

#include "heap_ranks.hpp"

namespace deep_ep::fabric {

// A stress: each thread of each rank writes rounds of random puts to all ranks, itself as well, a
// signal behind them, and checks what its twin on each rank wrote to it.

constexpr std::int64_t kArea = 200000;  // of one writer's thread: bytes, then two words
constexpr std::int64_t kAreaBytes = kArea + 128;
constexpr int kThreads = 3;
constexpr int kRounds = 60;

/// The bytes of one round, and how they are cut into puts.
struct Round {
  std::vector<std::uint32_t> words;
  std::vector<std::int64_t> cuts;

  Round(int from, int to, int thread, int round) {
    std::mt19937 random(static_cast<unsigned>(((from * 64 + to) * 64 + thread) * 1024 + round));
    const std::int64_t longest = random() % 4 == 0 ? kArea : 3000;
    words.resize(1 + random() % (longest / 4));
    for (auto& word : words) word = random() | 1;
    const auto bytes = static_cast<std::int64_t>(words.size() * 4);
    for (std::int64_t at = 0; at < bytes;) {
      cuts.push_back(at);
      at += 1 + static_cast<std::int64_t>(random() % (random() % 2 == 0 ? 64 : 90000));
    }
    cuts.push_back(bytes);
  }
};

struct Exchange {
  SymmetricHeap& heap;
  int rank;
  int size;

  std::int64_t area(int from, int thread) const { return (from * kThreads + thread) * kAreaBytes; }
  std::int64_t sent_word(int from, int thread) const { return area(from, thread) + kArea; }
  std::int64_t read_word(int from, int thread) const { return sent_word(from, thread) + 8; }

  void write(int to, int thread, int number, const Round& round) const {
    const auto* bytes = reinterpret_cast<const std::byte*>(round.words.data());
    for (std::size_t i = 0; i + 1 < round.cuts.size(); ++i) {
      const std::int64_t at = round.cuts[i];
      heap.put(to, area(rank, thread) + at, bytes + at, round.cuts[i + 1] - at);
    }
    heap.signal(to, sent_word(rank, thread), static_cast<std::uint64_t>(number));
  }

  void run(int thread) const {
    for (int number = 1; number <= kRounds; ++number) {
      std::vector<Round> sent;
      for (int to = 0; to < size; ++to) sent.emplace_back(rank, to, thread, number);
      for (int to = 0; to < size; ++to) write(to, thread, number, sent[to]);
      for (int from = 0; from < size; ++from) {
        ASSERT_EQ(await_word(heap, sent_word(from, thread), number), number) << "from " << from;
        const Round expected(from, rank, thread, number);
        ASSERT_EQ(std::memcmp(heap.base() + area(from, thread), expected.words.data(),
                              expected.words.size() * 4),
                  0)
            << "from " << from << " thread " << thread << " round " << number;
        heap.signal(from, read_word(rank, thread), number);
      }
      for (int to = 0; to < size; ++to) {
        ASSERT_TRUE(heap.flush(to, milliseconds(30000)));
        ASSERT_EQ(await_word(heap, read_word(to, thread), number), number) << "read by " << to;
      }
    }
  }
};

inline void exchange(Bootstrap& bootstrap) {
  const int size = bootstrap.size();
  const auto heap = make_heap(bootstrap, size * kThreads * kAreaBytes);
  const Exchange play{*heap, bootstrap.rank(), size};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back([&play, i] { play.run(i); });
  for (auto& thread : threads) thread.join();
  bootstrap.barrier();
}

}  // namespace deep_ep::fabric
