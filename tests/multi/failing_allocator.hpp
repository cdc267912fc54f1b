#pragma once

// operator new is replaced in the programs that link this.
namespace deep_ep::test {

/// The so many-th allocation of this thread from now on throws std::bad_alloc, once. 0: none does.
void fail_allocation(int number);
/// Whether one has failed since fail_allocation().
bool allocation_failed();

}  // namespace deep_ep::test
