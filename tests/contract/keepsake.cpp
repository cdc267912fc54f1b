#include "contract/keepsake.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

namespace deep_ep::test {
namespace {

constexpr int kMost = 4;  // for each number of ranks, so that these keep the same ones
constexpr std::int64_t kTokens = 12;
constexpr std::int64_t kHidden = 64;
constexpr int kTopk = 2;

/// Small integers, so that a sum of eight of them is exact; never 0.
float value(int source, std::int64_t token, std::int64_t i, std::uint64_t number) {
  return static_cast<float>(1 + (static_cast<std::uint64_t>(source) * 31 +
                                 static_cast<std::uint64_t>(token) * 7 +
                                 static_cast<std::uint64_t>(i) + number * 13) %
                                    1000);
}

/// Token t goes to ranks t % R and (t + 1) % R; each rank has one expert.
std::int64_t expert(std::int64_t token, int k, int num_ranks) { return (token + k) % num_ranks; }

bool goes_to(std::int64_t token, int rank, int num_ranks) {
  return expert(token, 0, num_ranks) == rank || expert(token, 1, num_ranks) == rank;
}

}  // namespace

void Keepsakes::take(Buffer& buffer) {
  const int ranks = buffer.num_ranks();
  const std::uint64_t number = taken_[ranks]++;
  std::vector<float> x;
  std::vector<std::int64_t> topk_idx;
  for (std::int64_t token = 0; token < kTokens; ++token) {
    for (std::int64_t i = 0; i < kHidden; ++i) x.push_back(value(buffer.rank(), token, i, number));
    for (int k = 0; k < kTopk; ++k) topk_idx.push_back(expert(token, k, ranks));
  }
  DispatchArgs args;
  const Tensor rows =
      Tensor(TensorView(x.data(), DType::kFloat32, {kTokens, kHidden})).to(buffer.device());
  const Tensor ids =
      Tensor(TensorView(topk_idx.data(), DType::kInt64, {kTokens, kTopk})).to(buffer.device());
  args.x = rows;
  args.topk_idx = ids;
  args.layout = buffer.get_dispatch_layout(args.topk_idx, ranks);
  kept_.push_back({&buffer, buffer.rank(), ranks, number, buffer.dispatch(args)});
  const auto alike = [ranks](const Keepsake& kept) { return kept.num_ranks == ranks; };
  if (std::count_if(kept_.begin(), kept_.end(), alike) > kMost)
    kept_.erase(std::find_if(kept_.begin(), kept_.end(), alike));
}

std::string Keepsakes::combine_oldest(Buffer& buffer) {
  for (const Keepsake& kept : kept_) {
    if (kept.buffer != &buffer) continue;
    CombineArgs args;
    args.x = kept.result.recv_x;
    args.handle = kept.result.handle;
    args.internode_handle = kept.result.internode_handle;
    const Tensor sums = buffer.combine(args).combined_x.to({});
    const auto* sum = sums.as<float>();
    for (std::int64_t token = 0; token < kTokens; ++token) {
      const auto copies = static_cast<float>(kept.num_ranks == 1 ? 1 : 2);
      for (std::int64_t i = 0; i < kHidden; ++i) {
        const float expected = copies * value(kept.rank, token, i, kept.number);
        if (sum[token * kHidden + i] != expected)
          return fmt::format("late combine of keepsake {}: combined_x[{}, {}] is {}, not {}",
                             kept.number, token, i, sum[token * kHidden + i], expected);
      }
    }
    return "";
  }
  return "";
}

std::string Keepsakes::check() const {
  for (const Keepsake& kept : kept_) {
    std::int64_t row = 0;
    const Tensor rows = kept.result.recv_x.to({});
    for (int source = 0; source < kept.num_ranks; ++source) {
      for (std::int64_t token = 0; token < kTokens; ++token) {
        if (!goes_to(token, kept.rank, kept.num_ranks)) continue;
        const float* x = rows.as<float>() + row * kHidden;
        for (std::int64_t i = 0; i < kHidden; ++i) {
          const float expected = value(source, token, i, kept.number);
          if (x[i] != expected)
            return fmt::format("live result {} changed: recv_x[{}, {}] is {}, not {}", kept.number,
                               row, i, x[i], expected);
        }
        ++row;
      }
    }
    if (row != kept.result.num_recv_tokens)
      return fmt::format("live result {} has {} rows, not {}", kept.number,
                         kept.result.num_recv_tokens, row);
  }
  return "";
}

void Keepsakes::forget_buffer(const Buffer& buffer) {
  for (Keepsake& kept : kept_) {
    if (kept.buffer == &buffer) kept.buffer = nullptr;
  }
}

}  // namespace deep_ep::test
