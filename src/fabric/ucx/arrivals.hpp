#pragma once

#include <cstdint>
#include <map>
#include <set>

namespace deep_ep::fabric::ucx {

/// Of numbers that come in any order, each once, from 0: up to which one all have come.
class Watermark {
 public:
  /// All numbers below this one have come.
  std::uint64_t next() const { return next_; }

  void add(std::uint64_t number) {
    if (number != next_) {
      early_.insert(number);
      return;
    }
    ++next_;
    while (!early_.empty() && *early_.begin() == next_) {
      early_.erase(early_.begin());
      ++next_;
    }
  }

 private:
  std::uint64_t next_ = 0;
  std::set<std::uint64_t> early_;
};

/// A word of a heap and what it is to become.
struct Word {
  std::uint64_t offset = 0;
  std::uint64_t value = 0;
};

/// The messages of one source, numbered from 0: holds back each signal until all messages before it
/// have come. UCX promises no order among active messages; over one connection they do come in
/// order, and then nothing is held.
class Arrivals {
 public:
  /// The bytes of put `number` lie in the heap. `set` is called for each word whose turn has come.
  template <class Set>
  void put(std::uint64_t number, Set&& set) {
    seen_.add(number);
    let_go(set);
  }

  template <class Set>
  void signal(std::uint64_t number, const Word& word, Set&& set) {
    if (number == seen_.next()) {
      set(word);  // its turn is now; what is held came later
    } else {
      held_.emplace(number, word);
    }
    seen_.add(number);
    let_go(set);
  }

 private:
  template <class Set>
  void let_go(Set& set) {
    while (!held_.empty() && held_.begin()->first < seen_.next()) {
      set(held_.begin()->second);
      held_.erase(held_.begin());
    }
  }

  Watermark seen_;
  std::map<std::uint64_t, Word> held_;
};

}  // namespace deep_ep::fabric::ucx
