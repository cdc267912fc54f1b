#include <cstdint>
#include <cstdio>
#include <vector>

#include "deep_ep/deep_ep.hpp"

// One rank that sends its two rows to itself: enough to need every layer of the library.
int main() {
  deep_ep::Buffer buffer(deep_ep::bootstrap_threads(1).front());
  const std::vector<std::int64_t> experts{1, 0};
  const std::vector<float> rows(2 * 8, 1.5f);
  deep_ep::DispatchArgs args;
  args.x = deep_ep::TensorView(rows.data(), deep_ep::DType::kFloat32, {2, 8});
  args.topk_idx = deep_ep::TensorView(experts.data(), deep_ep::DType::kInt64, {2, 1});
  args.layout = buffer.get_dispatch_layout(args.topk_idx, 2);
  const auto received = static_cast<int>(buffer.dispatch(args).num_recv_tokens);
  std::printf("deep_ep %s received %d rows\n", deep_ep::version(), received);
  return received == 2 ? 0 : 1;
}
