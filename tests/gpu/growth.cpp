#include "identity.hpp"

// Results that need new memory of every rank while the caller's thread is in a call that waits for
// the kernels, which wait for that memory to be mapped: freeing memory does, and so does loading
// kernels. What tells a kernel of mapped memory must not need the driver.
namespace deep_ep::test {
namespace {

using cuda::check;
using std::chrono_literals::operator""s;

/// Waits for all kernels, with the driver locked.
void allocate_and_free() {
  void* memory = nullptr;
  check(cudaMalloc(&memory, 1 << 20), "cudaMalloc");
  check(cudaFree(memory), "cudaFree");
}

std::string play(Worker& worker, const std::string&) {
  const Device device = device_of(worker);
  cudaStream_t stream = make_stream();
  Buffer buffer(worker.bootstrap(), {.device = device, .timeout = 10s});
  std::vector<DispatchResult> live;
  IntranodeHandle handle;
  for (const std::int64_t hidden : {64, 2048, 8192, 32768}) {
    const Shape shape{300, hidden, 3};
    const Round round(shape, 0, worker.rank(), worker.num_ranks());
    DispatchArgs args;
    args.options.stream = {stream};
    const Tensor x = Tensor::empty(DType::kFloat32, {shape.tokens, hidden}, device);
    copy_in(x, round.x.data(), stream);
    args.x = x;
    const Tensor ids = Tensor::empty(DType::kInt64, {shape.tokens, shape.topk}, device);
    copy_in(ids, round.ids.data(), stream);
    if (live.empty()) {
      args.topk_idx = ids;
      args.layout = buffer.get_dispatch_layout(ids, 2 * buffer.num_ranks(), args.options);
    } else {
      args.handle = handle;
    }
    const std::int64_t before = buffer.mapped_bytes();
    live.push_back(buffer.dispatch(args));
    allocate_and_free();
    if (hidden == 32768 && buffer.mapped_bytes() == before) return "nothing grew";
    if (live.size() == 1) handle = live.front().handle;
    CombineArgs back;
    back.options.stream = {stream};
    back.x = live.back().recv_x;
    back.handle = handle;
    const CombineResult sums = buffer.combine(back);
    allocate_and_free();
    const Tensor here = sums.combined_x.to({}, {stream});
    std::string wrong = round.check_sums(shape, here.as<float>(), "sums");
    if (!wrong.empty()) return wrong;
  }
  return "";
}

}  // namespace
}  // namespace deep_ep::test

int main() { return deep_ep::test::run_on_ranks(4, deep_ep::test::play, ""); }
