#include "modes/intranode.hpp"

#include "base/trace.hpp"

namespace deep_ep::intranode {

void barrier(Backend& backend, const BarrierParams& params) {
  trace::step("intranode::barrier");
  backend.barrier(params);
}

void notify_dispatch(Backend& backend, const NotifyDispatchParams& params) {
  trace::step("intranode::notify_dispatch");
  backend.notify_dispatch(params);
}

void dispatch(Backend& backend, const DispatchParams& params) {
  trace::step("intranode::dispatch");
  backend.dispatch(params);
}

void group_rows(Backend& backend, const GroupParams& params) {
  trace::step("intranode::group_rows");
  backend.group_rows(params);
}

void reduce_rows(Backend& backend, const ReduceParams& params) {
  trace::step("intranode::reduce_rows");
  backend.reduce_rows(params);
}

void cached_notify_combine(Backend& backend, const CombineParams& params) {
  trace::step("intranode::cached_notify_combine");
  backend.cached_notify_combine(params);
}

void combine(Backend& backend, const CombineParams& params) {
  trace::step("intranode::combine");
  backend.combine(params);
}

}  // namespace deep_ep::intranode
