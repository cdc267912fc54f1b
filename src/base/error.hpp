#pragma once

#include <fmt/format.h>

#include "deep_ep/error.hpp"

namespace deep_ep {

/// Throws Error(kInvalidArgument) unless `ok`. The text names the argument, its value and what is
/// allowed.
template <class... Args>
void require(bool ok, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok)
    throw Error(ErrorCode::kInvalidArgument, fmt::format(format, std::forward<Args>(args)...));
}

/// Throws Error(kSystem) with errno's text.
[[noreturn]] void throw_errno(std::string_view what);

}  // namespace deep_ep
