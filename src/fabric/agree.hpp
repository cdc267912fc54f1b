#pragma once

#include <optional>

#include "deep_ep/bootstrap.hpp"
#include "deep_ep/error.hpp"

namespace deep_ep::fabric {

/// Collective: throws on all ranks if it failed on one. A rank that failed throws its own error,
/// the others one of the same code that names the ranks which failed and the first one's reason.
void fail_together(Bootstrap& bootstrap, const std::optional<Error>& mine);

}  // namespace deep_ep::fabric
