#pragma once

#include <cstdint>
#include <string>

#include "deep_ep/deep_ep.hpp"

namespace deep_ep::test {

/// Calls over several nodes by handles, which send before the other ranks have announced the call:
/// of so many rows that the rings between nodes are full before a late rank comes. Every token goes
/// to every rank, and experts change nothing.
class HandlePlay {
 public:
  /// Collective: two dispatches, of which the handles are kept.
  explicit HandlePlay(Buffer& buffer);

  void dispatch();
  void combine();  // behind a dispatch
  /// What is wrong with the results of the last two, or "".
  std::string check() const;

  // What a victim does that the others do not: rows of another length, or the handle of a dispatch
  // in which its tokens stayed where they are.
  void dispatch_other_hidden();
  void dispatch_other_handle();

 private:
  InternodeHandle first_dispatch(bool to_all);
  DispatchResult dispatch_with(const Tensor& x, const InternodeHandle& handle);

  Buffer& buffer_;
  Tensor x_{};
  InternodeHandle to_all_{};
  InternodeHandle to_self_{};
  Tensor received_{};
  Tensor sums_{};
};

}  // namespace deep_ep::test
