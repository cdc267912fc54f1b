#include "modes/internode.hpp"

#include "base/error.hpp"
#include "base/trace.hpp"
#include "fabric/mesh.hpp"

namespace deep_ep::internode {

UniqueId UniqueId::decode(const std::string& text) {
  const std::size_t process = text.find(' ');
  const std::size_t gpus = process == text.npos ? text.npos : text.find(' ', process + 1);
  require(gpus != text.npos, "'{}' is not what a rank of this version tells of itself", text);
  return {text.substr(0, process), text.substr(process + 1, gpus - process - 1),
          text.substr(gpus + 1)};
}

// No step of the documented chain, which it is ahead of.
UniqueId get_unique_id() { return {fabric::host_id(), fabric::process_id()}; }

void init(Backend&) { trace::step("internode::init"); }

void alloc(Backend& backend, Bootstrap& bootstrap, std::int64_t bytes) {
  trace::step("internode::alloc");
  backend.alloc_symmetric(bootstrap, bytes);
}

void free(Backend& backend) {
  trace::step("internode::free");
  backend.free_symmetric();
}

void finalize(Backend&) { trace::step("internode::finalize"); }

int get_source_meta_bytes() { return sizeof(plan::SourceMeta); }

void get_dispatch_layout(Backend& backend, const LayoutParams& params) {
  trace::step("internode::get_dispatch_layout");
  backend.get_dispatch_layout(params);
}

void barrier(Backend& backend, const BarrierParams& params) {
  trace::step("internode::barrier");
  backend.barrier(params);
}

void notify_dispatch(Backend& backend, const NotifyDispatchParams& params) {
  trace::step("internode::notify_dispatch");
  backend.notify_dispatch(params);
}

void dispatch(Backend& backend, const DispatchParams& params) {
  trace::step("internode::dispatch");
  backend.dispatch(params);
}

void cached_notify(Backend& backend, const CombineParams& params) {
  trace::step("internode::cached_notify");
  backend.cached_notify(params);
}

void combine(Backend& backend, const CombineParams& params) {
  trace::step("internode::combine");
  backend.combine(params);
}

}  // namespace deep_ep::internode
