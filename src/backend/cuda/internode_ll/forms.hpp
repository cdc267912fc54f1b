#pragma once

#include <type_traits>

#include "backend/cuda/internode_ll/steps.hpp"

// The forms that a kernel is compiled for, and which one a call takes. Compiled by g++ and nvcc.
namespace deep_ep::cuda::internode_ll {

/// So few that a warp finds where one of them goes.
constexpr std::int64_t kFewTokens = 64;

/// What a kernel is compiled for: less code, which a kernel that runs once has to fetch from afar,
/// and less to jump over. All special forms are for fewer than 32 experts a token and at most 32
/// ranks, so that a warp holds them. Those of few tokens: at most kFewTokens, with all ids of one
/// loaded at once, at most one slice of one for each block, and rows in packets.
enum class Form : std::uint8_t {
  kAny,
  kExpertMajor,
  kRankMajor,
  kFewExpertMajor,
  kFewRankMajor,
  kCount,
};
constexpr bool is_of_few_tokens(Form form) {
  return form == Form::kFewExpertMajor || form == Form::kFewRankMajor;
}

/// The arguments of a step, and what is known of them when it is compiled.
template <class Args, Form kForm>
struct Formed : Args {
  static constexpr bool kFew = kForm != Form::kAny;
  static constexpr bool kIsOfFewTokens = is_of_few_tokens(kForm);
  static constexpr bool kRankMajor = kForm == Form::kRankMajor || kForm == Form::kFewRankMajor;
  DEEP_EP_HD bool is_rank_major() const {
    if constexpr (kForm == Form::kAny) return Args::rank_major;
    return kRankMajor;
  }
};

/// What puts has no forms of few tokens.
template <class Args>
constexpr bool has_form(Form form) {
  return !Args::kPuts || !is_of_few_tokens(form);
}

/// Of a kernel of so many blocks. `packeted`: this rank's rows travel in packets.
template <class Args>
Form form_of(const Args& args, unsigned blocks, bool packeted) {
  if (args.shape.num_topk >= 32 || args.shape.num_ranks > 32) return Form::kAny;
  const Form few = args.rank_major ? Form::kFewRankMajor : Form::kFewExpertMajor;
  if (has_form<Args>(few) && packeted && args.num_tokens <= kFewTokens && args.loads_whole_ids() &&
      args.num_tokens << args.slice_shift <= blocks)
    return few;
  return args.rank_major ? Form::kRankMajor : Form::kExpertMajor;
}

/// Calls `function` with the form as a type.
template <class Args, Form kForm = Form::kAny>
cudaError_t with_form(Form form, auto&& function) {
  if constexpr (kForm == Form::kCount) {
    return cudaErrorInvalidDeviceFunction;
  } else {
    if constexpr (has_form<Args>(kForm)) {
      if (form == kForm) return function(std::integral_constant<Form, kForm>{});
    }
    return with_form<Args, static_cast<Form>(static_cast<int>(kForm) + 1)>(form, function);
  }
}

/// Calls `function` with each form, until one fails.
template <class Args>
cudaError_t with_all_forms(auto&& function) {
  cudaError_t status = cudaSuccess;
  for (int i = 0; i < static_cast<int>(Form::kCount) && status == cudaSuccess; ++i)
    if (has_form<Args>(static_cast<Form>(i)))
      status = with_form<Args>(static_cast<Form>(i), function);
  return status;
}

}  // namespace deep_ep::cuda::internode_ll
