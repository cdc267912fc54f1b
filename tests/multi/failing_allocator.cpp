#include "multi/failing_allocator.hpp"

#include <cstdlib>
#include <new>

namespace {

thread_local int left = 0;
thread_local bool failed = false;

}  // namespace

namespace deep_ep::test {

void fail_allocation(int number) {
  left = number;
  failed = false;
}

bool allocation_failed() { return failed; }

}  // namespace deep_ep::test

// All forms that are used, so that each piece is freed by what allocated it: sanitizers compare.
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  if (left > 0 && --left == 0) {
    failed = true;
    return nullptr;
  }
  return std::malloc(bytes == 0 ? 1 : bytes);
}
void* operator new(std::size_t bytes) {
  void* memory = operator new(bytes, std::nothrow);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
