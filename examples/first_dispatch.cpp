// The smallest complete use: rows go to the ranks of their experts, and come back summed.
#include <cstdint>
#include <cstdio>
#include <vector>

#include <deep_ep/deep_ep.hpp>

int main() {
  using deep_ep::DType;
  deep_ep::Buffer buffer(deep_ep::bootstrap_from_environment());  // one rank if nothing is set

  // Four tokens of eight values. Each visits two of the 2 * R experts: the first of its own rank,
  // and one more, which for some tokens lives on another rank.
  constexpr std::int64_t kTokens = 4, kHidden = 8, kTopk = 2;
  const int num_experts = 2 * buffer.num_ranks();
  std::vector<float> x(kTokens * kHidden, 1.0f);
  std::vector<std::int64_t> experts;
  for (int token = 0; token < kTokens; ++token) {
    experts.push_back(2 * buffer.rank());
    experts.push_back((2 * buffer.rank() + 1 + token % (num_experts - 1)) % num_experts);
  }
  const deep_ep::TensorView topk_idx(experts.data(), DType::kInt64, {kTokens, kTopk});

  deep_ep::DispatchArgs send;
  send.x = {x.data(), DType::kFloat32, {kTokens, kHidden}};
  send.topk_idx = topk_idx;
  send.num_experts = num_experts;
  const deep_ep::DispatchResult received = buffer.dispatch(send);

  // The experts would work here, on received.recv_x; recv_topk_idx says which row is for which.
  deep_ep::CombineArgs back;
  back.x = received.recv_x;
  back.handle = received.handle;
  const deep_ep::CombineResult result = buffer.combine(back);

  // Nothing was computed, so each value is the number of ranks that its token went to.
  std::printf("rank %d received %lld rows\n", buffer.rank(),
              static_cast<long long>(received.num_recv_tokens));
  const bool* is_in_rank = received.handle.is_token_in_rank.as<bool>();
  bool correct = true;
  for (int token = 0; token < kTokens; ++token) {
    int visited = 0;
    for (int rank = 0; rank < buffer.num_ranks(); ++rank)
      visited += is_in_rank[token * buffer.num_ranks() + rank] ? 1 : 0;
    const float value = result.combined_x.as<float>()[token * kHidden];
    std::printf("rank %d token %d visited %d ranks, came back as %g\n", buffer.rank(), token,
                visited, static_cast<double>(value));
    correct = correct && value == static_cast<float>(visited);
  }
  return correct ? 0 : 1;
}
