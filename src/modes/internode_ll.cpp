#include "modes/internode_ll.hpp"

#include "base/error.hpp"
#include "base/trace.hpp"

namespace deep_ep::internode_ll {

void clean_low_latency_buffer(std::int64_t low_latency_bytes, const plan::LowLatencyShape& dispatch,
                              const plan::LowLatencyShape& combine) {
  trace::step("internode_ll::clean_low_latency_buffer");
  using plan::LowLatencyKind;
  using plan::LowLatencyLayout;
  if (LowLatencyLayout::fits(dispatch, LowLatencyKind::kDispatch, low_latency_bytes) &&
      LowLatencyLayout::fits(combine, LowLatencyKind::kCombine, low_latency_bytes))
    return;
  throw Error(ErrorCode::kCapacity,
              fmt::format("num_rdma_bytes is {}, calls of this shape need {}: see "
                          "Buffer::get_low_latency_rdma_size_hint",
                          low_latency_bytes, LowLatencyLayout::bytes(dispatch, combine)));
}

void dispatch(Backend& backend, const DispatchParams& params) {
  trace::step("internode_ll::dispatch");
  backend.dispatch(params);
}

void combine(Backend& backend, const CombineParams& params) {
  trace::step("internode_ll::combine");
  backend.combine(params);
}

}  // namespace deep_ep::internode_ll
