#include <gmock/gmock.h>
#include <signal.h>

#include <atomic>
#include <vector>

#include "deep_ep/error.hpp"
#include "heap_exchange.hpp"

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
      EXPECT_TRUE(await_loss(*heap, 0, milliseconds(20000)));
    }
    bootstrap.barrier();
  });
}

TEST(SymmetricHeap, OneRankReachesItself) { in_ranks(1, exchange); }

TEST(SymmetricHeap, LeavesSignalHandlersAlone) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    const auto handlers = [] {  // sanitizers have theirs
      std::vector<void (*)(int)> found;
      for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
        struct sigaction action {};
        EXPECT_EQ(sigaction(number, nullptr, &action), 0);
        found.push_back(action.sa_handler);
      }
      return found;
    };
    const auto before = handlers();
    const auto heap = make_heap(bootstrap, 4096);
    EXPECT_EQ(handlers(), before);
    bootstrap.barrier();
  });
}

TEST(SymmetricHeap, SleepsWhileNothingMoves) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    const auto heap = make_heap(bootstrap, 4096);
    bootstrap.barrier();
    const double before = cpu_seconds();
    std::this_thread::sleep_for(milliseconds(1000));
    EXPECT_LT(cpu_seconds() - before, 0.3);
    bootstrap.barrier();
  });
}

}  // namespace
}  // namespace deep_ep::fabric
