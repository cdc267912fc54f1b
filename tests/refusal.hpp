#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "deep_ep/error.hpp"

namespace deep_ep {

/// The text of the Error that `act` must throw, with that code.
inline std::string refusal(const std::function<void()>& act, ErrorCode code) {
  try {
    act();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was refused";
  return "";
}

}  // namespace deep_ep
