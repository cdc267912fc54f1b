#include "modes/internode.hpp"

#include "base/trace.hpp"

namespace deep_ep::internode {

void init(Backend&) { trace::step("internode::init"); }

void finalize(Backend&) { trace::step("internode::finalize"); }

void get_dispatch_layout(Backend& backend, const LayoutParams& params) {
  trace::step("internode::get_dispatch_layout");
  backend.get_dispatch_layout(params);
}

}  // namespace deep_ep::internode
