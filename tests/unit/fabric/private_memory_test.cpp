#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>

#include "fabric/memory.hpp"
#include "refusal.hpp"

namespace deep_ep::fabric {
namespace {

constexpr std::int64_t kHugePage = 2 << 20;

TEST(PrivateMemory, BeginsAtAHugePageIsZeroAndWritable) {
  for (const std::int64_t bytes : {std::int64_t{1}, kHugePage, kHugePage + 1}) {
    const auto mapping = allocate_private(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(mapping->base()) % kHugePage, 0u);
    EXPECT_EQ(mapping->bytes(), (bytes + kHugePage - 1) / kHugePage * kHugePage);
    for (std::int64_t i = 0; i < mapping->bytes(); i += 1024)
      ASSERT_EQ(mapping->base()[i], std::byte{0});
    std::memset(mapping->base(), 0x5a, mapping->bytes());
  }
}

TEST(PrivateMemory, AShortageIsAnErrorWithTheSize) {
  EXPECT_THAT(refusal([] { allocate_private(std::int64_t{1} << 46); }, ErrorCode::kOutOfMemory),
              testing::HasSubstr("70368744177664 bytes"));
  refusal([] { allocate_private(0); }, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace deep_ep::fabric
