#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "protocol/control.hpp"

namespace deep_ep {

/// What two ranks called with differently, as texts.
struct Difference {
  const char* field;
  std::string mine;
  std::string theirs;
};

/// In words: field `field` of CallRecord::agreed() is `mine` here and `theirs` there.
Difference describe_difference(int field, std::int64_t mine, std::int64_t theirs);

/// The first field on which two records disagree.
std::optional<Difference> find_difference(const protocol::CallRecord& mine,
                                          const protocol::CallRecord& theirs);

}  // namespace deep_ep
