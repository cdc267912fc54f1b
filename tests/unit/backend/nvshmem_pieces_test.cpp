#include <gtest/gtest.h>

#include <functional>
#include <thread>
#include <vector>

#include "backend/cuda/nvshmem/pieces.hpp"

namespace deep_ep::cuda::nvshmem {
namespace {

constexpr int kRanks = 3;

class NvshmemPieces : public testing::Test {
 protected:
  /// What a Buffer of all ranks gets: the number of a piece, and -1 if each had to make a new one.
  std::vector<int> find(std::int64_t bytes) {
    std::vector<int> found(kRanks, -2);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < kRanks; ++rank)
      threads.emplace_back(
          [&, rank] { found[rank] = ranks_[rank].find_free(*bootstraps_[rank], bytes); });
    for (std::thread& thread : threads) thread.join();
    return found;
  }
  void on_all(const std::function<void(int rank, Pieces& pieces)>& body) {
    for (int rank = 0; rank < kRanks; ++rank) body(rank, ranks_[rank]);
  }
  void add(std::int64_t bytes) {
    on_all([&](int, Pieces& pieces) { pieces.add(nullptr, bytes); });
  }
  static std::vector<int> all(int number) { return std::vector<int>(kRanks, number); }

  std::vector<std::shared_ptr<Bootstrap>> bootstraps_ = bootstrap_threads(kRanks);
  std::vector<Pieces> ranks_{kRanks};
};

TEST_F(NvshmemPieces, APieceServesAgainOnceAllRanksHaveGivenItBack) {
  add(1000);
  EXPECT_EQ(find(1000), all(-1));
  ranks_[0].give_back(0, false);
  ranks_[1].give_back(0, false);
  EXPECT_EQ(find(1000), all(-1)) << "rank 2 still uses it";
  ranks_[2].give_back(0, false);
  EXPECT_EQ(find(1000), all(0));
  on_all([](int, Pieces& pieces) { pieces.take(0); });
  EXPECT_EQ(find(1000), all(-1)) << "it is in use again";
}

TEST_F(NvshmemPieces, AfterAFaultOnOneRankNoRankGetsThePieceAgain) {
  add(1000);
  on_all([](int rank, Pieces& pieces) { pieces.give_back(0, rank == 1); });
  EXPECT_EQ(find(1000), all(-1));
  add(1000);
  on_all([](int, Pieces& pieces) { pieces.give_back(1, false); });
  EXPECT_EQ(find(1000), all(1)) << "the one that was made since is as good as any";
}

TEST_F(NvshmemPieces, APieceIsAsLargeAsWasAskedForAtLeast) {
  add(1000);
  add(3000);
  on_all([](int, Pieces& pieces) {
    pieces.give_back(0, false);
    pieces.give_back(1, false);
  });
  EXPECT_EQ(find(1000), all(0));
  EXPECT_EQ(find(1001), all(1));
  EXPECT_EQ(find(3001), all(-1));
}

}  // namespace
}  // namespace deep_ep::cuda::nvshmem
