#pragma once

#include "backend/cuda/arrays.hpp"
#include "backend/cuda/context.hpp"
#include "backend/cuda/intranode/steps.hpp"
#include "backend/params.hpp"

// Steps in this rank's own memory, queued on the communication stream.
namespace deep_ep::cuda {

inline int sms_of(const Context& context, const Call& call) {
  return call.num_threads < context.num_sms() ? call.num_threads : context.num_sms();
}

/// Bulk copies and wide loads need it, and a GPU does not survive a pointer that is not.
void require_aligned(const void* data, const char* name);

inline Ids ids_of(const TensorView& topk_idx) {
  return {topk_idx.defined() ? topk_idx.data : nullptr, topk_idx.dtype == DType::kInt64};
}

inline intranode::SumType sum_type(DType dtype) {
  return dtype == DType::kBfloat16  ? intranode::SumType::kBfloat16
         : dtype == DType::kFloat16 ? intranode::SumType::kFloat16
                                    : intranode::SumType::kFloat32;
}

/// The part of a dispatch's arguments that all modes have.
void set_step(const DispatchStep& params, DispatchStepArgs& args);

/// Behind a dispatch: results to where peers could not write them.
void copy_outputs(Context& context, const DispatchStep& params);

/// `counts`: intranode::group_count_bytes(), unless the groups are known.
void group_rows(Context& context, const deep_ep::intranode::GroupParams& params,
                std::int32_t* counts);
void reduce_rows(Context& context, const deep_ep::intranode::ReduceParams& params);

}  // namespace deep_ep::cuda
