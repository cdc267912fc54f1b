// Run from where libdeep_ep_ucx.so is not to be found.
#include <gmock/gmock.h>

#include "deep_ep/error.hpp"
#include "heap_ranks.hpp"

namespace deep_ep::fabric {
namespace {

TEST(SymmetricHeapWithoutPlugin, SaysOnAllRanksWhatIsMissingAndHowToGetIt) {
  in_ranks(2, [](Bootstrap& bootstrap) {
    try {
      make_heap(bootstrap, 4096);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      EXPECT_THAT(error.what(), ::testing::HasSubstr("libdeep_ep_ucx.so"));
      EXPECT_THAT(error.what(), ::testing::HasSubstr("libucx-dev"));
      EXPECT_THAT(error.what(), ::testing::HasSubstr("libucx0"));
    }
  });
}

}  // namespace
}  // namespace deep_ep::fabric
