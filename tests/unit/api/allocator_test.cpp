#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "deep_ep/deep_ep.hpp"

namespace deep_ep {
namespace {

/// Gives out blocks of a Buffer's segments and counts them.
class CountingAllocator final : public Allocator {
 public:
  std::shared_ptr<void> allocate(std::int64_t bytes, bool mapped, const CallOptions&) override {
    ++(mapped ? num_mapped : num_plain);
    if (answer_nothing) return nullptr;
    const Tensor memory =
        mapped && !lie ? buffer->allocate_mapped(bytes) : Tensor::empty(DType::kUint8, {bytes});
    std::memset(memory.data, 0x5a, static_cast<std::size_t>(bytes));
    return {memory.owner(), memory.data};
  }

  Buffer* buffer = nullptr;
  bool answer_nothing = false;
  bool lie = false;
  int num_mapped = 0;
  int num_plain = 0;
};

class AllocatorTest : public testing::Test {
 protected:
  AllocatorTest()
      : allocator(std::make_shared<CountingAllocator>()),
        buffer(bootstrap_threads(1)[0], {.allocator = allocator}) {
    allocator->buffer = &buffer;
  }

  DispatchResult dispatch() {
    return buffer.dispatch({.x = {x.data(), DType::kFloat32, {3, 4}},
                            .num_experts = 2,
                            .topk_idx = {ids.data(), DType::kInt64, {3, 1}}});
  }
  void expect_rows(const DispatchResult& got) {
    ASSERT_EQ(got.num_recv_tokens, 2);
    EXPECT_EQ(got.recv_x.as<float>()[0], 1);
    EXPECT_EQ(got.recv_x.as<float>()[4], 9);  // of token 2: token 1 goes nowhere
    const CombineResult sum = buffer.combine({.x = got.recv_x, .handle = got.handle});
    EXPECT_EQ(std::vector<float>(sum.combined_x.as<float>(), sum.combined_x.as<float>() + 12),
              (std::vector<float>{1, 2, 3, 4, 0, 0, 0, 0, 9, 10, 11, 12}));
  }

  std::vector<float> x{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  std::vector<std::int64_t> ids{0, -1, 1};
  std::shared_ptr<CountingAllocator> allocator;
  Buffer buffer;
};

TEST_F(AllocatorTest, AllResultsOfACallAreItsMemory) {
  const std::int64_t before = buffer.live_bytes();
  {
    const DispatchResult got = dispatch();
    EXPECT_EQ(allocator->num_mapped, 2);  // the rows, and what of the handle peers write
    EXPECT_EQ(allocator->num_plain, 2);   // the layout, and the rest of the handle
    EXPECT_GT(buffer.live_bytes(), before);
    expect_rows(got);
    EXPECT_EQ(allocator->num_plain, 3);
  }
  EXPECT_EQ(buffer.live_bytes(), before);
}

TEST_F(AllocatorTest, TheBufferUsesItsOwnMemoryWhereItGivesNone) {
  allocator->answer_nothing = true;
  expect_rows(dispatch());
}

TEST_F(AllocatorTest, MemoryThatPeersCannotWriteIsRefused) {
  allocator->lie = true;
  try {
    (void)dispatch();
    FAIL() << "no Error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(error.what()).find("allocate_mapped"), std::string::npos);
  }
}

TEST_F(AllocatorTest, MappedMemoryOutlivesTheBuffer) {
  const Tensor memory = buffer.allocate_mapped(1000);
  buffer.destroy();
  std::memset(memory.data, 1, 1000);
  EXPECT_THROW((void)buffer.allocate_mapped(1), Error);
}

}  // namespace
}  // namespace deep_ep
