#pragma once

#include <optional>

#include "deep_ep/bootstrap.hpp"
#include "deep_ep/error.hpp"

namespace deep_ep::fabric {

/// Collective: throws on all ranks if it failed on one. A rank that failed throws its own error,
/// the others one of the same code that names the ranks which failed and the first one's reason.
void fail_together(Bootstrap& bootstrap, const std::optional<Error>& mine);

/// Collective: runs a step of this rank, then throws on all ranks if it failed on one.
template <class Step>
void together(Bootstrap& bootstrap, Step&& step) {
  std::optional<Error> trouble;
  try {
    step();
  } catch (const Error& error) {
    trouble = error;
  } catch (const std::exception& error) {
    trouble = Error(ErrorCode::kOutOfMemory, error.what());
  }
  fail_together(bootstrap, trouble);
}

}  // namespace deep_ep::fabric
