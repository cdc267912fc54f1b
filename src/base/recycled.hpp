#pragma once

#include <cstddef>
#include <memory>
#include <utility>

namespace deep_ep {

/// An allocator for what comes and goes with every call, one at a time: an object gets the memory
/// that the last one left on the same thread. malloc keeps nothing of some KB at hand, and merges
/// what lies around it each time that it comes back.
template <class T>
class Recycled {
 public:
  using value_type = T;

  Recycled() = default;
  template <class Other>
  Recycled(const Recycled<Other>&) {}  // NOLINT(google-explicit-constructor)

  T* allocate(std::size_t count) {
    if (count == 1 && spare().memory != nullptr) return std::exchange(spare().memory, nullptr);
    return std::allocator<T>().allocate(count);
  }
  void deallocate(T* memory, std::size_t count) {
    if (count == 1 && spare().open && spare().memory == nullptr) {
      spare().memory = memory;
    } else {
      std::allocator<T>().deallocate(memory, count);
    }
  }
  friend bool operator==(const Recycled&, const Recycled&) { return true; }

 private:
  struct Spare {
    T* memory = nullptr;
    bool open = true;  // false behind the thread's end, when others may still let objects go
    ~Spare() {
      open = false;
      if (memory != nullptr) std::allocator<T>().deallocate(std::exchange(memory, nullptr), 1);
    }
  };
  static Spare& spare() {
    static thread_local Spare spare;
    return spare;
  }
};

/// As std::make_shared.
template <class T, class... Args>
std::shared_ptr<T> make_recycled(Args&&... args) {
  return std::allocate_shared<T>(Recycled<T>(), std::forward<Args>(args)...);
}

}  // namespace deep_ep
