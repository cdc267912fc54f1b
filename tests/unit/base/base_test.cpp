#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/trace.hpp"
#include "deep_ep/types.hpp"
#include "deep_ep/version.hpp"

namespace deep_ep {
namespace {

TEST(Error, KeepsCodeTextAndSortsRanks) {
  const Error error(ErrorCode::kTimeout, "late", {3, 1, 2});
  EXPECT_EQ(error.code(), ErrorCode::kTimeout);
  EXPECT_STREQ(error.what(), "late");
  EXPECT_THAT(error.ranks(), ::testing::ElementsAre(1, 2, 3));
}

TEST(Error, EveryCodeHasAName) {
  for (std::uint32_t code = 1; code <= 9; ++code)
    EXPECT_STRNE(to_string(static_cast<ErrorCode>(code)), "unknown");
}

TEST(Error, RequireThrowsOnlyWhenFalse) {
  EXPECT_NO_THROW(require(true, "never"));
  try {
    require(false, "size: {} is not allowed", 7);
    FAIL() << "did not throw";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_STREQ(error.what(), "size: 7 is not allowed");
  }
}

TEST(Error, ErrnoHasNameAndNumber) {
  errno = ENOENT;
  try {
    throw_errno("open");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kSystem);
    EXPECT_STREQ(error.what(), "open: No such file or directory (errno 2)");
  }
}

TEST(Types, SizesAndNamesOfAllElementTypes) {
  const std::vector<std::pair<std::size_t, std::string>> expected = {
      {1, "uint8"},   {1, "bool"},    {4, "int32"},    {8, "int64"},
      {4, "float32"}, {2, "float16"}, {2, "bfloat16"}, {1, "float8_e4m3"}};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(size_of(dtype), expected[i].first);
    EXPECT_EQ(to_string(dtype), expected[i].second);
  }
}

TEST(Version, MatchesTheNumbersOfTheHeader) {
  EXPECT_EQ(version(), fmt::format("{}.{}.{}", DEEP_EP_VERSION_MAJOR, DEEP_EP_VERSION_MINOR,
                                   DEEP_EP_VERSION_PATCH));
}

TEST(Trace, HookSeesStepsUntilItIsRemoved) {
  std::vector<std::string> seen;
  trace::step("before");
  trace::set_hook([&](std::string_view name) { seen.emplace_back(name); });
  trace::step("intranode::dispatch");
  trace::set_hook({});
  trace::step("after");
  EXPECT_THAT(seen, ::testing::ElementsAre("intranode::dispatch"));
}

}  // namespace
}  // namespace deep_ep
