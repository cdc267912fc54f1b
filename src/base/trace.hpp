#pragma once

#include <functional>
#include <string_view>

namespace deep_ep::trace {

/// Called with the qualified name of every step of the documented call chains, e.g.
/// "intranode::dispatch", by the thread that takes it. For tests: set it while no Buffer exists; an
/// empty function turns it off.
void set_hook(std::function<void(std::string_view)> hook);
void step(std::string_view name);

}  // namespace deep_ep::trace
