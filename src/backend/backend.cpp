#include "backend/backend.hpp"

#include "base/error.hpp"

namespace deep_ep {

namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorCode::kUnsupported, "this backend exchanges within one node only");
}

}  // namespace

void Backend::alloc_symmetric(Bootstrap&, std::int64_t) { refuse(); }
void Backend::barrier(const internode::BarrierParams&) { refuse(); }
void Backend::notify_dispatch(const internode::NotifyDispatchParams&) { refuse(); }
void Backend::dispatch(const internode::DispatchParams&) { refuse(); }
void Backend::cached_notify(const internode::CombineParams&) { refuse(); }
void Backend::combine(const internode::CombineParams&) { refuse(); }

}  // namespace deep_ep
