#pragma once

#include <cstdint>

#include "base/portable.hpp"

#if defined(DEEP_EP_HAS_LIBCUDACXX)
#include <cuda/atomic>
#else
#include <atomic>
#endif

// Shared words between ranks: plain integers in mapped memory, accessed only through these
// functions. System scope on GPUs. The order is in the name; every acquire names the release it
// pairs with at its call site.
namespace deep_ep::protocol {

#if defined(DEEP_EP_HAS_LIBCUDACXX)
template <class T>
using AtomicRef = ::cuda::atomic_ref<T, ::cuda::thread_scope_system>;
namespace order = ::cuda::std;
#else
template <class T>
using AtomicRef = std::atomic_ref<T>;
namespace order = std;
#endif
// Ranks map the words at different addresses, so a lock beside them would not do.
static_assert(AtomicRef<std::uint32_t>::is_always_lock_free);
static_assert(AtomicRef<std::uint64_t>::is_always_lock_free);

template <class T>
DEEP_EP_HD T load_relaxed(const T* word) {
  return AtomicRef<T>(*const_cast<T*>(word)).load(order::memory_order_relaxed);
}
template <class T>
DEEP_EP_HD T load_acquire(const T* word) {
  return AtomicRef<T>(*const_cast<T*>(word)).load(order::memory_order_acquire);
}
template <class T>
DEEP_EP_HD T load_seq_cst(const T* word) {
  return AtomicRef<T>(*const_cast<T*>(word)).load(order::memory_order_seq_cst);
}
template <class T>
DEEP_EP_HD void store_relaxed(T* word, T value) {
  AtomicRef<T>(*word).store(value, order::memory_order_relaxed);
}
template <class T>
DEEP_EP_HD void store_release(T* word, T value) {
  AtomicRef<T>(*word).store(value, order::memory_order_release);
}
template <class T>
DEEP_EP_HD T add_relaxed(T* word, T value) {
  return AtomicRef<T>(*word).fetch_add(value, order::memory_order_relaxed);
}
template <class T>
DEEP_EP_HD T add_acq_rel(T* word, T value) {
  return AtomicRef<T>(*word).fetch_add(value, order::memory_order_acq_rel);
}
template <class T>
DEEP_EP_HD T add_seq_cst(T* word, T value) {
  return AtomicRef<T>(*word).fetch_add(value, order::memory_order_seq_cst);
}
/// True if the word was `expected` and now is `desired`.
template <class T>
DEEP_EP_HD bool compare_exchange_acq_rel(T* word, T expected, T desired) {
  return AtomicRef<T>(*word).compare_exchange_strong(expected, desired, order::memory_order_acq_rel,
                                                     order::memory_order_acquire);
}

}  // namespace deep_ep::protocol
