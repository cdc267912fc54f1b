#include <benchmark/benchmark.h>

#include <memory>
#include <random>
#include <vector>

#include "plan/layout.hpp"

namespace deep_ep::plan {
namespace {

struct Table {
  RoutingShape shape;
  std::vector<std::int64_t> topk_idx;
  std::vector<std::int32_t> num_tokens_per_rank;
  std::vector<std::int32_t> num_tokens_per_expert;
  std::unique_ptr<bool[]> is_token_in_rank;

  Table(std::int64_t tokens, int ranks)
      : shape{.num_tokens = tokens, .num_topk = 8, .num_experts = 256, .num_ranks = ranks},
        topk_idx(static_cast<std::size_t>(tokens) * 8),
        num_tokens_per_rank(static_cast<std::size_t>(ranks)),
        num_tokens_per_expert(256),
        is_token_in_rank(new bool[static_cast<std::size_t>(tokens * ranks)]) {
    std::mt19937_64 random(1);
    for (auto& id : topk_idx) id = static_cast<std::int64_t>(random() % 256);
    find();
  }

  void find() {
    get_dispatch_layout(shape, topk_idx.data(), num_tokens_per_rank.data(),
                        num_tokens_per_expert.data(), is_token_in_rank.get());
  }
};

void layout(benchmark::State& state) {
  Table table(state.range(0), static_cast<int>(state.range(1)));
  for (auto _ : state) {
    table.find();
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

void send_slots(benchmark::State& state) {
  constexpr int kChannels = 10;
  const int ranks = static_cast<int>(state.range(1));
  Table table(state.range(0), ranks);
  std::vector<std::int32_t> send_head(static_cast<std::size_t>(state.range(0) * ranks));
  std::vector<std::int32_t> prefix(static_cast<std::size_t>(ranks * kChannels));
  for (auto _ : state) {
    build_send_slots(table.is_token_in_rank.get(), state.range(0), ranks, kChannels,
                     send_head.data(), prefix.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

BENCHMARK(layout)->ArgNames({"tokens", "ranks"})->ArgsProduct({{128, 4096}, {2, 8}});
BENCHMARK(send_slots)->ArgNames({"tokens", "ranks"})->ArgsProduct({{128, 4096}, {2, 8}});

}  // namespace
}  // namespace deep_ep::plan
