#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "contract/pool.hpp"
#include "deep_ep/deep_ep.hpp"

namespace deep_ep::test {

/// Calls with arguments that are wrong in random ways, on one rank. Whatever they are, a call
/// succeeds or throws an Error; after one that is no misuse the Buffer refuses all further calls
/// with the same Error, and a new one works.
class ArgumentFuzzer {
 public:
  /// One call as `seed` says. Returns what is wrong, or "".
  std::string run(Worker& worker, std::uint64_t seed);

  std::int64_t accepted() const { return accepted_; }
  std::int64_t refused() const { return refused_; }

 private:
  std::string check_fault(const Error& error);
  std::string check_still_right();

  std::unique_ptr<Buffer> buffer_;
  std::int64_t accepted_ = 0;
  std::int64_t refused_ = 0;
};

}  // namespace deep_ep::test
