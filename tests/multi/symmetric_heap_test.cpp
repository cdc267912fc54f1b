#include <gmock/gmock.h>
#include <signal.h>
#include <sys/resource.h>

#include <atomic>
#include <random>
#include <vector>

#include "deep_ep/error.hpp"
#include "symmetric_heap_ranks.hpp"

namespace deep_ep::fabric {
namespace {

TEST(SymmetricHeap, BeginsZeroedAndAligned) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    const auto heap = make_heap(bootstrap, 4096 + 8);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(heap->base()) % 128, 0u);
    EXPECT_EQ(heap->bytes(), 4096 + 8);
    for (int i = 0; i < 4096 + 8; ++i) ASSERT_EQ(heap->base()[i], std::byte{0});
    EXPECT_FALSE(heap->lost(1 - bootstrap.rank()));
    bootstrap.barrier();
  });
}

TEST(SymmetricHeap, RefusesWhatLiesOutside) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    const auto heap = make_heap(bootstrap, 4096);
    const std::uint64_t word = 1;
    const auto code = [](auto&& call) {
      try {
        call();
      } catch (const Error& error) {
        return error.code();
      }
      return ErrorCode{};
    };
    const auto refused = ErrorCode::kInvalidArgument;
    EXPECT_EQ(code([&] { heap->put(2, 0, &word, 8); }), refused);
    EXPECT_EQ(code([&] { heap->put(-1, 0, &word, 8); }), refused);
    EXPECT_EQ(code([&] { heap->put(1, 4089, &word, 8); }), refused);
    EXPECT_EQ(code([&] { heap->put(1, -8, &word, 8); }), refused);
    EXPECT_EQ(code([&] { heap->put(1, INT64_MAX, &word, 8); }), refused);
    EXPECT_EQ(code([&] { heap->put(1, 0, &word, -1); }), refused);
    EXPECT_EQ(code([&] { heap->signal(1, 4, 1); }), refused);
    EXPECT_EQ(code([&] { heap->signal(1, 4096, 1); }), refused);
    EXPECT_EQ(code([&] { heap->put(1, 4088, &word, 8); }), ErrorCode{});
    bootstrap.barrier();
  });
}

TEST(SymmetricHeap, DifferentSizesAreRefusedOnAllRanks) {
  in_ranks(3, [](Bootstrap& bootstrap) {
    try {
      make_heap(bootstrap, bootstrap.rank() == 2 ? 8192 : 4096);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kDisagreement) << error.what();
    }
  });
}

TEST(SymmetricHeap, CountsWhatItWasGiven) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    const auto heap = make_heap(bootstrap, 1 << 20);
    const std::vector<char> source(300000, 'x');
    heap->put(1, 0, source.data(), 300000);
    heap->put(1, 300000, source.data(), 5);
    heap->put(1, 0, source.data(), 0);
    heap->signal(1, 400000, 7);
    EXPECT_TRUE(heap->flush(1, milliseconds(10000)));
    EXPECT_EQ(heap->counts().puts, 3);
    EXPECT_EQ(heap->counts().put_bytes, 300005);
    EXPECT_EQ(heap->counts().signals, 1);
    bootstrap.barrier();
  });
}

// --- a stress: each thread of each rank writes rounds of random puts to all ranks, itself as well,
// signals behind them, and checks what its twin on each rank wrote to it.

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

void exchange(Bootstrap& bootstrap) {
  const int size = bootstrap.size();
  const auto heap = make_heap(bootstrap, size * kThreads * kAreaBytes);
  const Exchange play{*heap, bootstrap.rank(), size};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back([&play, i] { play.run(i); });
  for (auto& thread : threads) thread.join();
  bootstrap.barrier();
}

TEST(SymmetricHeap, BytesLieThereWhenTheSignalBehindThemDoesOverAnyTransport) {
  in_ranks(4, exchange);
}

TEST(SymmetricHeap, BytesLieThereWhenTheSignalBehindThemDoesOverTcp) {
  in_ranks(4, [](Bootstrap& bootstrap) {
    setenv("UCX_TLS", "tcp", 1);
    setenv("UCX_NET_DEVICES", "lo", 1);
    exchange(bootstrap);
  });
}

TEST(SymmetricHeap, SignalsOfOneThreadArriveInOrder) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    constexpr int kLast = 20000;
    const auto heap = make_heap(bootstrap, 4096);
    if (bootstrap.rank() == 0) {
      for (std::uint64_t i = 1; i <= kLast; ++i) {
        heap->signal(1, 0, i);
        heap->signal(1, 8, i);
      }
    } else {
      for (std::uint64_t second = 0; second < kLast;) {
        second = await_word(*heap, 8, second + 1);
        const auto first = await_word(*heap, 0, 0);
        ASSERT_GE(first, second);
      }
    }
    bootstrap.barrier();
  });
}

TEST(SymmetricHeap, RingsWhenAWordIsSet) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    std::atomic<int> rung = 0;
    const auto heap = make_heap(bootstrap, 4096, [&] {
      rung.fetch_add(1);
      rung.notify_all();
    });
    bootstrap.barrier();
    heap->signal(1 - bootstrap.rank(), 0, 5);
    rung.wait(0);
    EXPECT_EQ(await_word(*heap, 0, 5, milliseconds(0)), 5u);
    const int before = rung.load();
    heap->signal(bootstrap.rank(), 8, 6);
    EXPECT_GT(rung.load(), before);
    EXPECT_EQ(await_word(*heap, 8, 6, milliseconds(0)), 6u);
    bootstrap.barrier();
  });
}

TEST(SymmetricHeap, ALastSignalArrivesThoughItsSenderIsGone) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    const std::vector<char> source(1 << 20, 'x');
    auto heap = make_heap(bootstrap, (1 << 20) + 8);
    if (bootstrap.rank() == 0) {
      heap->put(1, 0, source.data(), 1 << 20);
      heap->signal(1, 1 << 20, 1);
      heap.reset();
    } else {
      EXPECT_EQ(await_word(*heap, 1 << 20, 1), 1u);
      EXPECT_EQ(std::memcmp(heap->base(), source.data(), 1 << 20), 0);
      EXPECT_TRUE(await_loss(*heap, 0, milliseconds(5000)));
    }
    bootstrap.barrier();
  });
}

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

TEST(SymmetricHeap, SleepsWhileNothingMoves) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    const auto heap = make_heap(bootstrap, 4096);
    bootstrap.barrier();
    const double before = cpu_seconds();
    std::this_thread::sleep_for(milliseconds(1000));
    EXPECT_LT(cpu_seconds() - before, 0.1);
    bootstrap.barrier();
  });
}

}  // namespace
}  // namespace deep_ep::fabric
