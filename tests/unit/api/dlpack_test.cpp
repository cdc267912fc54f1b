#include <dlpack/dlpack.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <memory>

#include "deep_ep/error.hpp"
#include "deep_ep/tensor.hpp"

namespace deep_ep {
namespace {

// kDLBool and kDLFloat8_e4m3fn came later than the header of some distributions.
constexpr int kBoolCode = 6;
constexpr int kFloat8E4m3fnCode = 10;

struct Row {
  DType dtype;
  int code;
  int bits;
};
constexpr std::array<Row, 8> kRows{{{DType::kUint8, kDLUInt, 8},
                                    {DType::kBool, kBoolCode, 8},
                                    {DType::kInt32, kDLInt, 32},
                                    {DType::kInt64, kDLInt, 64},
                                    {DType::kFloat32, kDLFloat, 32},
                                    {DType::kFloat16, kDLFloat, 16},
                                    {DType::kBfloat16, kDLBfloat, 16},
                                    {DType::kFloat8E4m3, kFloat8E4m3fnCode, 8}}};

/// What another library would hand over: a float32 array in its own memory.
struct Foreign {
  std::array<float, 6> data{1, 2, 3, 4, 5, 6};
  std::array<std::int64_t, 2> shape{2, 3};
  std::array<std::int64_t, 2> strides{3, 1};
  int* deleted = nullptr;
  DLManagedTensor managed{};

  static Foreign* make(int* deleted) {
    auto* foreign = new Foreign;
    foreign->deleted = deleted;
    DLTensor& tensor = foreign->managed.dl_tensor;
    tensor.data = foreign->data.data();
    tensor.device = {kDLCPU, 0};
    tensor.ndim = 2;
    tensor.dtype = {kDLFloat, 32, 1};
    tensor.shape = foreign->shape.data();
    tensor.strides = foreign->strides.data();
    foreign->managed.manager_ctx = foreign;
    foreign->managed.deleter = [](DLManagedTensor* self) {
      auto* it = static_cast<Foreign*>(self->manager_ctx);
      ++*it->deleted;
      delete it;
    };
    return foreign;
  }
};

ErrorCode code_of_from_dlpack(DLManagedTensor* managed) {
  try {
    (void)from_dlpack(managed);
  } catch (const Error& error) {
    return error.code();
  }
  ADD_FAILURE() << "no Error";
  return {};
}

TEST(Dlpack, EveryDtypeGoesOutAndComesBack) {
  for (const Row& row : kRows) {
    const Tensor tensor = Tensor::empty(row.dtype, {3, 16});
    std::memset(tensor.data, 0x5a, tensor.nbytes());
    DLManagedTensor* managed = to_dlpack(tensor);
    EXPECT_EQ(managed->dl_tensor.dtype.code, row.code) << to_string(row.dtype);
    EXPECT_EQ(managed->dl_tensor.dtype.bits, row.bits) << to_string(row.dtype);
    EXPECT_EQ(managed->dl_tensor.dtype.lanes, 1);
    EXPECT_EQ(managed->dl_tensor.device.device_type, kDLCPU);
    const Tensor back = from_dlpack(managed);
    EXPECT_EQ(back.data, tensor.data);
    EXPECT_EQ(back.dtype, row.dtype);
    EXPECT_EQ(back.describe(), tensor.describe());
  }
}

TEST(Dlpack, TheExportKeepsTheMemoryUntilItIsDeleted) {
  int data[4] = {1, 2, 3, 4};
  bool freed = false;
  Tensor tensor(TensorView(data, DType::kInt32, {4}),
                std::shared_ptr<void>(data, [&](void*) { freed = true; }));
  DLManagedTensor* managed = to_dlpack(tensor);
  tensor = {};
  EXPECT_FALSE(freed);
  EXPECT_EQ(static_cast<int*>(managed->dl_tensor.data)[3], 4);
  managed->deleter(managed);
  EXPECT_TRUE(freed);
}

TEST(Dlpack, StridesGoOutAsTheyAre) {
  float data[12] = {};
  TensorView view(data, DType::kFloat32, {3, 4});
  view.strides = {1, 3};
  DLManagedTensor* managed = to_dlpack(view);
  ASSERT_NE(managed->dl_tensor.strides, nullptr);
  EXPECT_EQ(managed->dl_tensor.strides[0], 1);
  EXPECT_EQ(managed->dl_tensor.strides[1], 3);
  managed->deleter(managed);
}

TEST(Dlpack, AnImportIsDeletedWithItsLastCopy) {
  int deleted = 0;
  Tensor tensor = from_dlpack(&Foreign::make(&deleted)->managed);
  Tensor copy = tensor;
  tensor.release();
  EXPECT_EQ(deleted, 0);
  EXPECT_EQ(copy.describe(), "float32[2, 3]");
  EXPECT_EQ(copy.as<float>()[5], 6.0F);
  copy = {};
  EXPECT_EQ(deleted, 1);
}

TEST(Dlpack, NullStridesMeanRowMajor) {
  int deleted = 0;
  Foreign* foreign = Foreign::make(&deleted);
  foreign->managed.dl_tensor.strides = nullptr;
  const Tensor tensor = from_dlpack(&foreign->managed);
  EXPECT_TRUE(tensor.is_contiguous());
  EXPECT_EQ(tensor.strides[0], 3);
}

TEST(Dlpack, TheByteOffsetCounts) {
  int deleted = 0;
  Foreign* foreign = Foreign::make(&deleted);
  foreign->shape = {1, 3};
  foreign->managed.dl_tensor.byte_offset = 3 * sizeof(float);
  const Tensor tensor = from_dlpack(&foreign->managed);
  EXPECT_EQ(tensor.as<float>()[0], 4.0F);
}

TEST(Dlpack, AnImportWithoutDeleterIsAllowed) {
  int deleted = 0;
  std::unique_ptr<Foreign> foreign(Foreign::make(&deleted));
  foreign->managed.deleter = nullptr;
  { const Tensor tensor = from_dlpack(&foreign->managed); }
  EXPECT_EQ(deleted, 0);
}

TEST(Dlpack, WhatCannotBeExpressedIsRefusedAndStaysWithItsOwner) {
  const std::array<void (*)(DLTensor&), 4> spoils{[](DLTensor& tensor) {
                                                    tensor.dtype = {kDLComplex, 64, 1};
                                                  },
                                                  [](DLTensor& tensor) {
                                                    tensor.dtype = {kDLFloat, 64, 1};
                                                  },
                                                  [](DLTensor& tensor) {
                                                    tensor.dtype = {kDLFloat, 32, 4};
                                                  },
                                                  [](DLTensor& tensor) {
                                                    tensor.device = {kDLOpenCL, 0};
                                                  }};
  for (auto* spoil : spoils) {
    int deleted = 0;
    Foreign* foreign = Foreign::make(&deleted);
    spoil(foreign->managed.dl_tensor);
    EXPECT_EQ(code_of_from_dlpack(&foreign->managed), ErrorCode::kUnsupported);
    EXPECT_EQ(deleted, 0);
    foreign->managed.deleter(&foreign->managed);
    EXPECT_EQ(deleted, 1);
  }
}

TEST(Dlpack, TooManyDimensionsAreRefused) {
  int deleted = 0;
  const std::unique_ptr<Foreign> foreign(Foreign::make(&deleted));
  std::array<std::int64_t, TensorView::kMaxDims + 1> ones{1, 1, 1, 1, 1};
  foreign->managed.dl_tensor.ndim = TensorView::kMaxDims + 1;
  foreign->managed.dl_tensor.shape = ones.data();
  foreign->managed.dl_tensor.strides = ones.data();
  EXPECT_EQ(code_of_from_dlpack(&foreign->managed), ErrorCode::kInvalidArgument);
  EXPECT_EQ(deleted, 0);
}

TEST(Dlpack, ANegativeSizeIsRefusedAndAHugeOneDoesNotOverflow) {
  int deleted = 0;
  const std::unique_ptr<Foreign> foreign(Foreign::make(&deleted));
  foreign->managed.deleter = nullptr;
  foreign->managed.dl_tensor.strides = nullptr;
  foreign->shape = {-1, 3};
  EXPECT_EQ(code_of_from_dlpack(&foreign->managed), ErrorCode::kInvalidArgument);
  std::array<std::int64_t, 3> huge{1, std::int64_t{1} << 40, std::int64_t{1} << 40};
  foreign->managed.dl_tensor.ndim = 3;
  foreign->managed.dl_tensor.shape = huge.data();
  EXPECT_EQ(from_dlpack(&foreign->managed).strides[0], INT64_MAX);
}

TEST(Dlpack, NoTensorIsNotExported) {
  try {
    (void)to_dlpack(Tensor());
    ADD_FAILURE() << "no Error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace deep_ep
