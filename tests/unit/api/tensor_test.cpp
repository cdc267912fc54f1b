#include "deep_ep/tensor.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <utility>

#include "deep_ep/error.hpp"

namespace deep_ep {
namespace {

using testing::HasSubstr;

template <class Call>
std::string error_of(Call&& call, ErrorCode code) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no Error";
  return "";
}

TEST(TensorView, AContiguousViewHasRowMajorStrides) {
  float data[24] = {};
  const TensorView view(data, DType::kFloat32, {2, 3, 4});
  EXPECT_TRUE(view.defined());
  EXPECT_EQ(view.data, data);
  EXPECT_EQ(view.ndim, 3);
  EXPECT_EQ(view.numel(), 24);
  EXPECT_EQ(view.nbytes(), sizeof data);
  EXPECT_EQ(view.strides[0], 12);
  EXPECT_EQ(view.strides[1], 4);
  EXPECT_EQ(view.strides[2], 1);
  EXPECT_TRUE(view.is_contiguous());
  EXPECT_EQ(view.device, Device{});
}

TEST(TensorView, DefaultMeansNoTensor) {
  const TensorView view;
  EXPECT_FALSE(view.defined());
  EXPECT_EQ(view.nbytes(), 0U);
}

TEST(TensorView, AColumnMajorViewIsNotContiguous) {
  float data[12] = {};
  TensorView view(data, DType::kFloat32, {3, 4});
  view.strides = {1, 3};
  EXPECT_FALSE(view.is_contiguous());
}

TEST(TensorView, StridesOfDimensionsOfOneDoNotMatter) {
  float data[4] = {};
  TensorView view(data, DType::kFloat32, {1, 4});
  view.strides = {77, 1};
  EXPECT_TRUE(view.is_contiguous());
}

TEST(TensorView, AnEmptyViewIsContiguousAndHasNoBytes) {
  const TensorView view(nullptr, DType::kBfloat16, {0, 7168});
  EXPECT_TRUE(view.defined());
  EXPECT_EQ(view.numel(), 0);
  EXPECT_EQ(view.nbytes(), 0U);
  EXPECT_TRUE(view.is_contiguous());
}

TEST(TensorView, SizesBeyond32BitsAreExact) {
  const TensorView view(nullptr, DType::kBfloat16, {std::int64_t{1} << 31, 7168});
  EXPECT_EQ(view.numel(), (std::int64_t{1} << 31) * 7168);
  EXPECT_EQ(view.nbytes(), (std::size_t{1} << 32) * 7168);
}

TEST(TensorView, CountsBeyond63BitsAreTheLargestNumber) {
  constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(TensorView(nullptr, DType::kUint8, {std::int64_t{1} << 62, 6}).numel(), kMost);
  EXPECT_EQ(TensorView(nullptr, DType::kUint8, {0, kMost, kMost}).numel(), 0);
}

TEST(TensorView, MoreDimensionsThanThereCanBeAreHarmless) {
  TensorView view(nullptr, DType::kUint8, {2, 3, 4, 5});
  view.ndim = 100;
  EXPECT_EQ(view.numel(), 120);
  EXPECT_EQ(view.describe(), "uint8[2, 3, 4, 5]");
}

TEST(TensorView, RefusesNegativeAndTooManyDimensions) {
  EXPECT_THAT(error_of(
                  [] {
                    TensorView(nullptr, DType::kUint8, {3, -2});
                  },
                  ErrorCode::kInvalidArgument),
              HasSubstr("-2"));
  EXPECT_THAT(error_of(
                  [] {
                    TensorView(nullptr, DType::kUint8, {1, 2, 3, 4, 5});
                  },
                  ErrorCode::kInvalidArgument),
              HasSubstr("5"));
}

TEST(TensorView, DescribesDtypeAndShape) {
  EXPECT_EQ(TensorView(nullptr, DType::kBfloat16, {4096, 7168}).describe(), "bfloat16[4096, 7168]");
  EXPECT_EQ(TensorView(nullptr, DType::kInt64, {0}).describe(), "int64[0]");
}

TEST(Tensor, EmptyMemoryIsAlignedAndWritable) {
  for (const std::int64_t rows : {1, 3, 1000}) {
    const Tensor tensor = Tensor::empty(DType::kFloat32, {rows, 5});
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensor.data) % 64, 0U);
    EXPECT_TRUE(tensor.is_contiguous());
    for (std::int64_t i = 0; i < tensor.numel(); ++i) tensor.as<float>()[i] = 1.0F;
  }
}

TEST(Tensor, EmptyOfNoElementsIsDefined) {
  const Tensor tensor = Tensor::empty(DType::kFloat32, {0, 5});
  EXPECT_TRUE(tensor.defined());
  EXPECT_EQ(tensor.numel(), 0);
}

TEST(Tensor, TheLastCopyFreesTheMemory) {
  int data[2] = {3, 4};
  bool freed = false;
  Tensor first(TensorView(data, DType::kInt32, {2}),
               std::shared_ptr<void>(data, [&](void*) { freed = true; }));
  Tensor second = first;
  first.release();
  EXPECT_FALSE(freed);
  EXPECT_EQ(second.as<int>()[1], 4);
  second = {};
  EXPECT_TRUE(freed);
}

TEST(Tensor, ReleasingTwiceIsHarmless) {
  Tensor tensor = Tensor::empty(DType::kUint8, {16});
  tensor.release();
  tensor.release();
  EXPECT_EQ(tensor.owner(), nullptr);
}

TEST(DTypes, SizesAndNamesAreThoseOfTheTypes) {
  const std::pair<DType, std::pair<std::size_t, const char*>> expected[] = {
      {DType::kUint8, {1, "uint8"}},       {DType::kBool, {1, "bool"}},
      {DType::kInt32, {4, "int32"}},       {DType::kInt64, {8, "int64"}},
      {DType::kFloat32, {4, "float32"}},   {DType::kFloat16, {2, "float16"}},
      {DType::kBfloat16, {2, "bfloat16"}}, {DType::kFloat8E4m3, {1, "float8_e4m3"}}};
  for (const auto& [dtype, size_and_name] : expected) {
    EXPECT_EQ(size_of(dtype), size_and_name.first);
    EXPECT_STREQ(to_string(dtype), size_and_name.second);
  }
}

}  // namespace
}  // namespace deep_ep
