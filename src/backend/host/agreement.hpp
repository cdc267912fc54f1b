#pragma once

#include <optional>
#include <string>

#include "protocol/control.hpp"

namespace deep_ep::host {

/// The first field in which two ranks' calls differ, in words.
struct Difference {
  const char* field;
  std::string mine;
  std::string theirs;
};
std::optional<Difference> find_difference(const protocol::CallRecord& mine,
                                          const protocol::CallRecord& theirs);

}  // namespace deep_ep::host
