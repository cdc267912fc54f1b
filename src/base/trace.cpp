#include "base/trace.hpp"

#include <atomic>

namespace deep_ep::trace {
namespace {

std::function<void(std::string_view)> installed;
std::atomic<bool> active{false};

}  // namespace

void set_hook(std::function<void(std::string_view)> hook) {
  active.store(false, std::memory_order_relaxed);
  installed = std::move(hook);
  // release: pairs with the acquire in step().
  active.store(static_cast<bool>(installed), std::memory_order_release);
}

void step(std::string_view name) {
  if (active.load(std::memory_order_acquire)) installed(name);
}

}  // namespace deep_ep::trace
